"""
Other people's conversations: a .jsonl file of them, every turn checked before anything is learned.

    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
     "tools": [...]}                                        a line each; tools, if there are any

Names of roles and fields are those of the OpenAI interface, as in chat.py. What would be learned
wrongly or could not be rendered is refused by its line and its turn.

    read      a file -> (messages, tools) for every question in it
    check     ValueError says what is wrong with one conversation

Not here  how a conversation becomes text: chat.py
"""

import json
from types import NoneType

import command

import chat


def read(path, raw=None):
    """A .jsonl -> (messages, tools) for every question in it. ValueError names the line. raw: its
    bytes, if they have been read.
    """
    out, text = [], command.text(path) if raw is None else command.spelled(raw, path)
    for i, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            talk = json.loads(line)
            if not isinstance(talk, dict):
                raise ValueError("it is no {...}")
            messages, tools = talk.get("messages"), talk.get("tools")
            check(messages, tools)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}, line {i}: {e}") from None
        out += [(d, tools) for d in chat.documents(messages) if d[-1]["role"] == "assistant"]
    if not out:
        raise ValueError(f"{path} holds no conversation")
    return out


def named(tools):
    """The names of tools that somebody else has described; ValueError says what is wrong."""
    if not isinstance(tools, (list, NoneType)):
        raise ValueError(f"tools is a {type(tools).__name__}, which is no list")
    found = set()
    for i, tool in enumerate(tools or ()):
        tool = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
            raise ValueError(f"tool {i} has no name")
        schema = tool.get("parameters") or {}
        about = schema.get("properties", {}) if isinstance(schema, dict) else None
        if not isinstance(about, dict) or not all(isinstance(x, dict) for x in about.values()):
            raise ValueError(f"tool {i} ({tool['name']}) has parameters that are no JSON schema")
        for one in (tool, *about.values()):
            if not isinstance(one.get("description", ""), str):
                raise ValueError(f"tool {i} ({tool['name']}) has a description that is no text")
        found.add(tool["name"])
    return found


def check(messages, tools=None):
    """ValueError says what is wrong with a conversation somebody else has written."""
    known = named(tools)
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is no list of turns")
    for i, m in enumerate(messages):
        if not isinstance(m, dict) or m.get("role") not in chat.ROLES:
            role = m.get("role") if isinstance(m, dict) else m
            raise ValueError(
                f"turn {i} has the role {role!r}, which is none of {', '.join(chat.ROLES)}"
            )
        if m["role"] == "system" and i:
            raise ValueError(f"turn {i} is the system's, whose only place is the first")
        content = m.get("content")
        if not isinstance(content, str) and not (m["role"] == "assistant" and content is None):
            raise ValueError(
                f"turn {i} ({m['role']}) has the content {content!r}, which is no text"
            )
        if not isinstance(m.get("reasoning_content") or "", str):
            raise ValueError(f"turn {i} has a reasoning_content that is no text")
        try:
            wanted = chat.calls(m)
        except ValueError as e:
            raise ValueError(f"turn {i} has {e}") from None
        for name, _ in wanted:
            if name not in known:
                raise ValueError(
                    f"turn {i} calls {name!r}, which is none of its tools: {sorted(known)}"
                )
        said = (content or "").strip() or wanted or (m.get("reasoning_content") or "").strip()
        if m["role"] == "assistant" and not said:
            raise ValueError(f"turn {i} is an empty reply")
    if messages[-1]["role"] != "assistant" or not any(m["role"] == "user" for m in messages):
        raise ValueError("it has no question, or does not end with a reply: nothing to learn")
