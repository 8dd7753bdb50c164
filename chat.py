"""
Chat: conversations as text, which of it a model learns to say, and what a reply says.

    <|im_start|>system                   always there, often empty; then the tools, if there are any
    ...<|im_end|>
    <|im_start|>user
    What is 2+2?<|im_end|>               little effort: "{reasoning effort: low}" is added here
    <|im_start|>assistant
    <think>                              so far the prompt; without reasoning "<think></think>"
    Two and two are four.
    </think>
    4<|im_end|>                          from behind the prompt to here: sampled, and learned

The mode of reasoning is text like everything else. Reasoning before the last question is dropped
(truncate), and `<think></think>` stands in its place; between the last question and its answer,
through any number of tool calls, it stays. So a conversation of n questions is n documents, each of
which teaches its last answer (`documents`).

Only the template says special tokens. What a user, a system text or a tool's result says is spelled
as ordinary text, whatever it looks like: no data can open a turn or close one.

    render    messages -> the text        parts    the same in parts: whose, and which are learned
    encode    parts -> ids, learned       reply    a sampled text -> reasoning, content, calls
    parse     a rendered text -> messages

Not here  what is asked: post/tasks.py; other people's conversations: post/talks.py. The paragraph
          in which the release explains how to call a tool is NVIDIA's text; HOW_TO_CALL says it in
          our own words, `how_to_call` takes another's
Sources   the chat template beside the released checkpoints of Nano and Super, followed to the
          character; names of fields as in the OpenAI interface
Departs   the line break after <|im_end|> is not learned: sampling stops before it
"""

import json
import re
from typing import NamedTuple

import torch

import tokenizer

START, END = "<|im_start|>", "<|im_end|>"
THINK, ENOUGH = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"
RESULT, GIVEN = "<tool_response>", "</tool_response>"
SPECIAL = (START, END, THINK, ENOUGH, CALL, CALLED, RESULT, GIVEN)
ROLES = ("system", "user", "assistant", "tool")
TOOLS = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
HOW_TO_CALL = """

A function is called like this, and several calls may follow one another:

<tool_call>
<function=name of the function>
<parameter=name of a parameter>
its value, over as many lines as it takes
</parameter>
</function>
</tool_call>

Give every required parameter. Say what there is to say before the call, and nothing after it."""


# 1. Rendering


class Part(NamedTuple):
    """A stretch of the text. tag: it is one of the template's special tokens; said: it is in an
    assistant's turn; learned: and the prompt does not have it yet, and no question follows.
    """

    text: str
    tag: bool = False
    said: bool = False
    learned: bool = False


def as_json(value):
    """A value as JSON."""
    return json.dumps(value, ensure_ascii=False)


def spell(value):
    """A value as the template prints it: JSON if it has parts, else as Python says it."""
    return as_json(value) if isinstance(value, (dict, list)) else str(value)


def describe(tools, how_to_call=None):
    """The `# Tools` part of the system turn. tools: dicts with name, description and parameters (a
    JSON schema), or with these under `function`."""

    def rest(d, *known):
        return [f"<{k}>{spell(v)}</{k}>" for k, v in d.items() if k not in known]

    lines = [TOOLS]
    for tool in tools:
        tool = tool.get("function", tool)
        schema = tool.get("parameters") or {}
        lines += ["<function>", f"<name>{tool['name']}</name>"]
        if "description" in tool:
            lines.append(f"<description>{str(tool['description']).strip()}</description>")
        lines.append("<parameters>")
        for name, about in (schema.get("properties") or {}).items():
            about = about if isinstance(about, dict) else {}  # JSON schema's true: anything
            lines += ["<parameter>", f"<name>{name}</name>"]
            if "type" in about:
                lines.append(f"<type>{about['type']}</type>")
            if "description" in about:
                lines.append(f"<description>{str(about['description']).strip()}</description>")
            if "enum" in about:
                lines.append(f"<enum>{as_json(about['enum'])}</enum>")
            lines += [*rest(about, "name", "type", "description", "enum"), "</parameter>"]
        lines += rest(schema, "type", "properties", "required")
        if "required" in schema:
            lines.append(f"<required>{as_json(schema['required'])}</required>")
        lines.append("</parameters>")
        lines += [*rest(tool, "type", "name", "description", "parameters"), "</function>"]
    lines.append("</tools>")
    return "\n".join(lines) + (HOW_TO_CALL if how_to_call is None else how_to_call)


def thought(message, keep):
    """An assistant's text before its calls, with its reasoning or (keep=False) without it."""
    text, reasoning = message.get("content") or "", message.get("reasoning_content")
    calls = message.get("tool_calls")
    if isinstance(reasoning, str) and reasoning.strip():
        text = f"{THINK}\n{reasoning}\n{ENOUGH}\n{text}"
    elif THINK not in text and ENOUGH not in text:
        text = THINK + ENOUGH + text
    if not keep and ENOUGH in text and (THINK in text or calls):
        rest = text.split(ENOUGH)[-1]
        text = THINK + ENOUGH + (rest.strip() if calls else rest)
    elif not keep and calls:
        text = THINK + ENOUGH + text.split(THINK)[0].strip()
    return text.strip()


def calls(message):
    """(name, arguments) of a message's tool calls."""
    try:
        some = [one_call(call.get("function", call)) for call in message.get("tool_calls") or ()]
    except (LookupError, TypeError, AttributeError, ValueError):
        raise ValueError("a tool call without a name or with bad arguments") from None
    for name, given in some:
        if not isinstance(name, str) or not isinstance(given, dict):
            raise ValueError(f"a call of {name!r:.60} with {given!r:.60}: it names no parameters")
    return some


def one_call(call):
    given = call.get("arguments") or {}
    return call["name"], json.loads(given) if isinstance(given, str) else given


def turns(messages):
    """A list of messages; ValueError for one without a role. Any content is said as the template
    says it.
    """
    found = list(messages)
    for i, m in enumerate(found):
        if not isinstance(m, dict) or not isinstance(m.get("role"), str):
            raise ValueError(f"turn {i} has no role: {m!r:.60}")
    return found


def assistant(message, keep, learned):
    """The parts of an assistant's turn, from behind its header to <|im_end|>. What the prompt for
    it has said already is never learned.
    """
    body = spoken(message, keep)
    before = given_before(body)
    out = [Part(text, tag, True, False) for text, tag in body[:before]]
    if before == 1:  # <think> and a line break, which is the beginning of the text behind it
        text = body[1][0]
        out.append(Part("\n", False, True, False))
        body[1] = (text[1:], False)
    return [*out, *(Part(text, tag, True, learned) for text, tag in body[before:] if text)]


def spoken(message, keep):
    """The same turn as (text, whether it is a special token) pairs, none of them empty."""
    pieces = re.split(f"({THINK}|{ENOUGH})", thought(message, keep))
    body = [(text, text in (THINK, ENOUGH)) for text in pieces]
    some = calls(message)
    if some:
        body.append(("\n", False))
    for name, given in some:
        inside = "".join(f"<parameter={k}>\n{spell(v)}\n</parameter>\n" for k, v in given.items())
        body += [(CALL, True), (f"\n<function={name}>\n{inside}</function>\n", False)]
        body += [(CALLED, True), ("\n", False)]
    return [(text, tag) for text, tag in [*body, (END, True)] if text]


def given_before(body):
    """How many parts of a turn the prompt for it has said: `<think>` and a line break (1), or
    `<think></think>` (2), or nothing that the turn begins with (0)."""
    first = [text for text, _ in body[:2]]
    if first == [THINK, ENOUGH]:
        return 2
    return int(first[0] == THINK and len(first) > 1 and first[1].startswith("\n"))


def parts(
    messages,
    tools=None,
    generate=False,
    thinking=True,
    low_effort=False,
    truncate=True,
    budget=None,
    how_to_call=None,
):
    """`render`, in Parts."""
    if budget is not None and (type(budget) is not int or budget < 0):
        raise ValueError(f"a budget of {budget!r} tokens")
    system, rest = "", turns(messages)
    if rest and rest[0]["role"] == "system":
        system = rest.pop(0).get("content") or ""
    about = "\n\n" * bool(system and tools) + (describe(tools, how_to_call) if tools else "")
    out = [Part(START, True), Part("system\n" + system + about), Part(END, True), Part("\n")]
    question = max((i for i, m in enumerate(rest) if m["role"] == "user"), default=-1)  # the last
    mode = "\n\n{reasoning effort: low}" * low_effort
    mode += "" if budget is None else f"\n\n{{thinking token budget: {budget}}}"
    for i, m in enumerate(rest):
        role, content = m["role"], m.get("content", "")
        if role == "assistant":
            out += [Part(START, True), Part("assistant\n")]
            out += [*assistant(m, not truncate or i >= question, i > question), Part("\n")]
        elif role == "tool":
            if i and rest[i - 1]["role"] != "tool":  # results in a row share a turn
                out += [Part(START, True), Part("user\n")]
            out += [Part(RESULT, True), Part(f"\n{content}\n"), Part(GIVEN, True), Part("\n")]
            if rest[i + 1 : i + 2] == [] or rest[i + 1]["role"] != "tool":
                out += [Part(END, True), Part("\n")]
        else:
            text = f"{role}\n{content}" + mode * (i == question)
            out += [Part(START, True), Part(text), Part(END, True), Part("\n")]
    if generate:
        out += [Part(START, True), Part("assistant\n"), Part(THINK, True)]
        out.append(Part("\n") if thinking else Part(ENOUGH, True))
    return out


def render(
    messages,
    tools=None,
    generate=False,
    thinking=True,
    low_effort=False,
    truncate=True,
    budget=None,
    how_to_call=None,
):
    """A conversation as text: the released chat template.

    generate    end in the prompt for the assistant's next turn
    thinking    which then begins with reasoning, or without
    low_effort  asks for little of it (Super); budget: for so many tokens of it (Nano)
    truncate    leaves out the reasoning of turns before the last question
    """
    how = tools, generate, thinking, low_effort, truncate, budget, how_to_call
    return "".join(part.text for part in parts(messages, *how))


def documents(messages):
    """A conversation of n questions as n that each end with one answer: what each teaches."""
    ends = [i for i, m in enumerate(messages) if m["role"] == "user"][1:] + [len(messages)]
    return [messages[:i] for i in ends]


# 2. Parsing

ONE_CALL = re.compile(
    rf"{CALL}\n<function=([^>\n]+)>\n((?:<parameter=[^>\n]+>\n.*?\n</parameter>\n)*)"
    rf"</function>\n{CALLED}\n?",
    re.S,
)
PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n(.*?)\n</parameter>\n", re.S)


class Reply(NamedTuple):
    """What an assistant's text says. formed: no tag stands where it should not, in the reasoning,
    in the answer, or of a call that cannot be carried out.
    """

    reasoning: str
    content: str
    calls: list  # of (name, {parameter: text})
    formed: bool


def reply(text, thinking=True):
    """A sampled text, which follows the prompt and ends before <|im_end|> -> Reply."""
    reasoning, rest = "", text
    if thinking:
        reasoning, _, rest = text.partition(ENOUGH)
    found = [(name, dict(PARAMETER.findall(given))) for name, given in ONE_CALL.findall(rest)]
    content = ONE_CALL.sub("", rest).strip()
    reasoning = reasoning.removesuffix("\n")
    formed = not any(tag in reasoning + content for tag in SPECIAL)
    return Reply(reasoning, content, found, formed)


def message(text, thinking=True):
    """A sampled text -> the assistant's message, as `render` takes it."""
    said = reply(text, thinking)
    out = dict(role="assistant", content=said.content)
    if said.reasoning:
        out["reasoning_content"] = said.reasoning
    if said.calls:
        out["tool_calls"] = [
            dict(type="function", function=dict(name=name, arguments=given))
            for name, given in said.calls
        ]
    return out


def parse(text):
    """What `render` said, as messages again: without the tools and the mode. Exact where it can be:
    an assistant's text without tags or blanks at its ends, arguments that are text."""
    out = []
    for turn in text.split(START)[1:]:
        role, _, body = turn.partition("\n")
        body = body.removesuffix("\n").removesuffix(END)
        if role == "assistant":
            think = body.startswith(THINK + "\n")
            body = body.removeprefix(THINK + "\n" if think else THINK + ENOUGH)
            out.append(message(body, think))
        elif role == "user" and body.startswith(RESULT):
            for result in re.findall(rf"{RESULT}\n(.*?)\n{GIVEN}\n", body, re.S):
                out.append(dict(role="tool", content=result))
        else:
            out.append(dict(role=role, content=body))
    if out and out[0]["role"] == "system":
        system, tools, _ = out[0]["content"].partition(TOOLS)
        out[0]["content"] = system.removesuffix("\n\n") if tools else system
    return out[1:] if out and out[0] == dict(role="system", content="") else out


# 3. Ids


def with_special(enc):
    """The tokenizer with the template's special tokens; new ones come behind its last id."""
    there, size = dict(enc._special_tokens), enc.max_token_value + 1
    new = {s: size + i for i, s in enumerate(s for s in SPECIAL if s not in there)}
    if not new:
        return enc
    again = tokenizer.pack(enc)
    return tokenizer.unpack(again | dict(special={**there, **new}))


def encode(enc, said):
    """Parts -> ids, and whether each is learned. A special token is one id, where the template says
    it; other text is spelled in runs, cut where the prompt for a reply ends, as in sampling."""
    ids, learned, run, owner = [], [], "", False
    missing = [s for s in SPECIAL if s not in enc._special_tokens]
    if missing:
        raise ValueError(
            f"the tokenizer {enc.name} has no special token {missing[0]}: its model was not taught "
            "to answer; python sft.py makes one that is"
        )

    def close():
        new = tokenizer.spell(enc, run)
        return new, [owner] * len(new)

    for part in [*said, Part("", True)]:  # the last one closes the run that is still open
        if part.tag or part.learned != owner:
            new, owned = close()
            ids, learned, run, owner = ids + new, learned + owned, "", part.learned
        if part.tag and part.text:
            ids.append(enc._special_tokens[part.text])
            learned.append(part.learned)
        elif not part.tag:
            run += part.text
    return ids, learned


def enough(enc, thought):
    """The ids that close a reasoning which has had its tokens, done or not."""
    line = tokenizer.spell(enc, "\n")
    return [*(line if thought else ()), enc.encode_single_token(ENOUGH), *line]


@torch.no_grad()
def grow(weights, vocab):
    """A model's tensors by name, with rows of embedding and head for ids up to vocab: the new ones
    are the mean of the old, which no logit is surprised by."""
    out = dict(weights)
    for name in ("backbone.embeddings.weight", "lm_head.weight"):
        table = weights[name]
        if not len(table):
            raise ValueError(f"{name} has no row to begin new ones with")
        new = max(0, vocab - len(table))
        out[name] = torch.cat([table, table.mean(0).expand(new, -1)])
    return out


def main():
    """Prints a conversation as it is trained on, what is learned between > and <; a reply read."""
    talk = [
        dict(role="user", content="2+2?"),
        dict(role="assistant", reasoning_content="Two and two.", content="4"),
        dict(role="user", content="And the weather in Oslo? <|im_end|>"),
        dict(
            role="assistant",
            reasoning_content="Ask.",
            content=None,
            tool_calls=[dict(name="weather", arguments=dict(city="Oslo"))],
        ),
        dict(role="tool", content="rain"),
        dict(role="assistant", content="It rains."),
    ]
    for document in documents(talk):
        print("".join(f">{p.text}<" if p.learned else p.text for p in parts(document)))
    print(reply("Ask.\n</think>\n<tool_call>\n<function=f>\n</function>\n</tool_call>"))
    enc = with_special(tokenizer.tokenizer("bytes"))
    ids, _ = encode(enc, parts(talk))
    print(
        f"turns: {ids.count(enc._special_tokens[START])}; <|im_end|> as a token: "
        f"{ids.count(enc._special_tokens[END])}, in the text: {render(talk).count(END)}"
    )


if __name__ == "__main__":
    import command

    command.demo(main, __doc__)
