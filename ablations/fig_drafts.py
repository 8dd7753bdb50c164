"""
How many tokens should be drafted at once?

Claim     with MTP drafts the model writes more tokens a second, one user's and all users'; the best
          length for one user is 6, at 2.89 times the speed without
          arXiv:2604.12374 figure 5; the Nemotron 3 Ultra report's sweep of draft lengths

Varied    the draft length, 0 to 7; sequences at once
Equal     the toy's acceptance of each draft (fig_mtp.py: one block shared by two depths, a draft
          cache, three seeds), and what a round costs Super: ablations/roofline.py's bytes

Here      acceptance is measured, at 0.72 a draft near what Super's published 3.3 to 3.5 tokens a
          round of 8 come to; seconds are a bound by arithmetic: a round reads the weights once, the
          experts of its d + 1 tokens, and for each draft the MTP block and the head. Neighbouring
          tokens are taken to choose experts independently, which makes long drafts look dear
"""

from ablations import draw, fig_mtp, roofline
from ablations.figure import look
from ablations.lab import Claim, Figure, main
from config import Config
from model import costs
from plot import sheet


def acceptance(seed):
    """{draft: share accepted} of a seed, from fig_mtp's rows."""
    for series in ("full", "extra"):
        line = look(fig_mtp.FIGURE, series).lines("rate")[fig_mtp.SHARED].get(seed)
        if line:
            return line
    raise ValueError(f"no row of seed {seed} in fig_mtp's receipts: run it with that seed first")


def cell(settings, seed):
    """Tokens a round by length, and speed over no drafts."""
    m, c, B = roofline.supers("nvfp4"), Config.preset("super"), settings["sequences"]
    draft, alone = roofline.drafted(c, costs(c, 0), B), roofline.moved(m, B, 1)
    rate, tokens, stands, speed = acceptance(seed), 1.0, 1.0, 1.0
    found = dict(tokens=[(0, tokens)], speed=[(0, speed)])
    for d in range(1, 8):
        stands *= rate[d]
        tokens += stands
        speed = tokens / ((roofline.moved(m, B, d + 1) + d * draft) / alone)
        found["tokens"].append((d, tokens))
        found["speed"].append((d, speed))
    return found | {f"speed, {d} drafts": speed for d, speed in found["speed"]}


FRONT, ULTRA = "arXiv:2604.12374, figure 5", "Nemotron 3 Ultra report, sweep of draft lengths"
USER, ALL = "1 at once", "256 at once"


def faster(says, where, published, users, drafts, than, reason=""):
    more, less = f"speed, {drafts} drafts", f"speed, {than} drafts"
    return Claim(says, where, published, users, users, more, less, reason)


CLAIMS = (
    faster("For one user, three drafts write more tokens a second than none",
           FRONT, "more, at every number of users", USER, 3, 0),
    faster("For 256 users, three drafts write more tokens a second than none",
           FRONT, "more, at every number of users", ALL, 3, 0),
    faster("For one user six drafts are faster than three",
           ULTRA, "6 is best, 2.89 times", USER, 6, 3,
           "Every token of a round calls 22 other experts of each layer, 2.7 GB of weights beside "
           "the 11 GB that all share, if neighbours choose independently. Where many sequences "
           "read most experts anyway (16, 256), six is the best here too"),
    faster("For one user six drafts are faster than seven", ULTRA, "6 is best", USER, 6, 7),
)  # fmt: skip


def picture(found):
    """Left: tokens a round. Right: speed over no drafts, a line a number of sequences."""
    fig, (a, b) = sheet(1, 2, figsize=(11, 5))
    draw.curves(a, found.only(USER), "tokens", names=False)
    a.plot([7], [3.33], "D", color=draw.GREY, ms=8)
    a.annotate("Super, published", (7, 3.33), (-105, -60), textcoords="offset points", color="0.4")
    a.set(xlabel="drafts", ylabel="tokens a round", title="Each further draft adds less")
    b.set(xlabel="drafts", ylabel="speed over no drafts (a bound)", ylim=(0, 3.2))
    draw.curves(b, found, "speed")
    b.axhline(1, color="k", lw=1)
    b.plot([6], [2.89], "D", color=draw.GREY, ms=8)
    b.annotate("Ultra, one user", (6, 2.89), (-110, -4), textcoords="offset points", color="0.4")
    b.set_title(draw.title(found, CLAIMS[0], 44))
    return fig


FIGURE = Figure(
    name="drafts",
    claims=CLAIMS,
    draw=picture,
    variants={f"{B} at once": dict(sequences=B) for B in (1, 16, 256)},
    units={"": "times the speed without drafts"},
    cell=cell,
    base=dict(acceptance=look(fig_mtp.FIGURE).stamp()),
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
