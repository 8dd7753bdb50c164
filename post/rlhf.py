"""
Rewards from a judge that compares: how a ranking of pairs becomes a number for each reply, and how
length is kept in check.

A judge reads a prompt and two replies, and says two scores of helpfulness, 1 to 5, and a ranking,
1 (the first is much better) to 6 (the second is). All pairs of a group would be n(n-1)/2 readings;
a circle is n:

    matches (1,2) (2,3) ... (n,1)    equal scores are parted: s_1 += 3.5 - r, s_2 += r - 3.5
    base_i  = mean of i's two matches
    w_i     = 1 - (l_i - l_min) / (l_max - l_min), less its group's mean     l: tokens of a part
    R_i     = base_i + a_think w_i^think + a_answer w_i^answer
              + bonus to the shortest reasoning and to the shortest answer, where base is among the
                group's best fifth

Judges prefer long replies; without the length terms a policy learns that before anything else. They
compare within a group, as the advantage does: a prompt that needs a long answer is not held against
it. The judge itself is trained the same way, on pairs that people have scored (h_1, h_2, rank):

    R = -10 [cannot be read] - |s_1 - h_1| - |s_2 - h_2| - |r - rank|

Letters   n replies to one prompt
Not here  a judge that is a model: here it is any function (prompt, reply, reply) -> (s_1, s_2, r)
Sources   arXiv:2512.20848 section 3.3 and equations 1 to 6; coefficients: Super's released
          configuration of RLHF, arXiv:2604.12374 section 3.2
"""

import torch


def circle(judge, prompt, replies):
    """The n comparisons of one group -> matches (n, 3)."""
    around = [*replies[1:], replies[0]]
    said = [judge(prompt, a, b) for a, b in zip(replies, around)]
    return torch.tensor(said, dtype=torch.float64)


def base(matches):
    """matches (n, 3): what was said of replies i and i+1, round and round -> (n,)"""
    if matches.ndim != 2 or matches.shape[1] != 3 or not matches.isfinite().all():
        raise ValueError(f"matches {tuple(matches.shape)}: (n, 3) finite numbers")
    first, second, r = matches.unbind(1)
    tie = (first == second) * (3.5 - r)
    return (first + tie + (second - tie).roll(1)) / 2


def shorter(length):
    """1 for the group's shortest to 0 for its longest, less the mean; 0 if all are as long. (n,)"""
    span = length.max() - length.min()
    w = 1 - (length - length.min()) / span.clamp(min=1)
    return w - w.mean()


def rewards(
    matches,
    think,
    answer,
    a_think=0.3,
    a_answer=0.35,
    bonus_think=0.5,
    bonus_answer=0.5,
    best=0.2,
):
    """matches (n, 3), tokens of the reasoning and of the answer (n,) -> rewards (n,)"""
    b = base(matches)
    if not b.shape == think.shape == answer.shape:
        raise ValueError(f"{len(b)} replies, lengths of {len(think)} and {len(answer)}")
    out = b + a_think * shorter(think) + a_answer * shorter(answer)
    for length, bonus in ((think, bonus_think), (answer, bonus_answer)):
        i = int(length.argmin())
        out[i] += bonus * float(b[i] >= b.quantile(1 - best))
    return out


def judge_reward(said, human, readable=True, unreadable=10.0, ranking=1.0):
    """said, human: score, score, ranking -> what training the judge itself rewards."""
    if not readable:
        return -unreadable
    first, second, rank = (abs(float(a) - float(b)) for a, b in zip(said, human))
    return -first - second - ranking * rank


def main():
    """Prints one circle of three, and what control of the length makes of it."""
    m = torch.tensor([[4.0, 4, 2], [3, 5, 5], [2, 1, 1]])
    think, answer = torch.tensor([10.0, 20, 40]), torch.tensor([5.0, 5, 5])
    print("matches (score, score, ranking)", m.tolist())
    print("base                           ", [round(v, 3) for v in base(m).tolist()])
    print("shorter reasoning, 10 20 40    ", [round(v, 3) for v in shorter(think).tolist()])
    print(
        "rewards                        ", [round(v, 3) for v in rewards(m, think, answer).tolist()]
    )


if __name__ == "__main__":
    import command

    command.demo(main, __doc__)
