"""
What another engine needs beside the weights to chat the same way: three small files.

    tokenizer.json          the table and its merges as the tokenizers library reads them
    generation_config.json  temperature 1 and top-p 0.95; a reply ends at <|im_end|>
    chat_template.jinja     chat.render in jinja's language, of our own writing

hf.save(model, dir, enc=enc) writes them; `python heal.py --release DIR` does so with a healed run.

Not here  the weights and config.json: hf.py; the paragraph that explains calls is chat.HOW_TO_CALL,
          or the one given
Sources   names of files and fields as in the released checkpoint; variables of the template
          (enable_thinking, low_effort, truncate_history_thinking) as there
"""

import json
from pathlib import Path

import chat
from tokenizer import halves

TEMPLATE = r"""
{%- set thinking = enable_thinking if enable_thinking is defined else true -%}
{%- set low = low_effort if low_effort is defined else false -%}
{%- set cut = truncate_history_thinking if truncate_history_thinking is defined else true -%}
{%- macro spelled(v) -%}
{%- if v is mapping or (v is iterable and v is not string) -%}{{ v | tojson }}
{%- else -%}{{ v }}{%- endif -%}
{%- endmacro -%}
{%- macro others(d, known) -%}
{%- for k, v in d.items() if k not in known -%}
{{ "<" ~ k ~ ">" ~ spelled(v) ~ "</" ~ k ~ ">\n" }}
{%- endfor -%}
{%- endmacro -%}
{%- macro about(tool) -%}
{{ "<function>\n<name>" ~ tool.name ~ "</name>\n" }}
{%- if tool.description is defined -%}
{{ "<description>" ~ (tool.description | trim) ~ "</description>\n" }}
{%- endif -%}
{{ "<parameters>\n" }}
{%- set schema = tool.parameters or {} -%}
{%- for name, one in (schema.properties or {}).items() -%}
{%- set one = one if one is mapping else {} -%}
{{ "<parameter>\n<name>" ~ name ~ "</name>\n" }}
{%- if one.type is defined -%}{{ "<type>" ~ one.type ~ "</type>\n" }}{%- endif -%}
{%- if one.description is defined -%}
{{ "<description>" ~ (one.description | trim) ~ "</description>\n" }}
{%- endif -%}
{%- if one.enum is defined -%}{{ "<enum>" ~ (one.enum | tojson) ~ "</enum>\n" }}{%- endif -%}
{{ others(one, ["name", "type", "description", "enum"]) ~ "</parameter>\n" }}
{%- endfor -%}
{{ others(schema, ["type", "properties", "required"]) }}
{%- if schema.required is defined -%}
{{ "<required>" ~ (schema.required | tojson) ~ "</required>\n" }}
{%- endif -%}
{{ "</parameters>\n" ~ others(tool, ["type", "name", "description", "parameters"]) }}
{{- "</function>\n" }}
{%- endmacro -%}
{%- macro body(m, keep) -%}
{%- set calls = m.tool_calls or [] -%}
{%- set said = m.content or "" -%}
{%- if m.reasoning_content is string and m.reasoning_content | trim -%}
{%- set said = "<think>\n" ~ m.reasoning_content ~ "\n</think>\n" ~ said -%}
{%- elif "<think>" not in said and "</think>" not in said -%}
{%- set said = "<think></think>" ~ said -%}
{%- endif -%}
{%- if not keep and "</think>" in said and ("<think>" in said or calls) -%}
{%- set rest = said.split("</think>")[-1] -%}
{%- set said = "<think></think>" ~ ((rest | trim) if calls else rest) -%}
{%- elif not keep and calls -%}
{%- set said = "<think></think>" ~ (said.split("<think>")[0] | trim) -%}
{%- endif -%}
{{ (said | trim) ~ ("\n" if calls else "") }}
{%- for c in calls -%}
{%- set call = c.function if c.function is defined else c -%}
{{ "<tool_call>\n<function=" ~ call.name ~ ">\n" }}
{%- for k, v in (call.arguments or {}).items() -%}
{{ "<parameter=" ~ k ~ ">\n" ~ spelled(v) ~ "\n</parameter>\n" }}
{%- endfor -%}
{{ "</function>\n</tool_call>\n" }}
{%- endfor -%}
{%- endmacro -%}
{%- set first = messages and messages[0].role == "system" -%}
{%- set system = (messages[0].content or "") if first else "" -%}
{%- set rest = messages[1:] if first else messages -%}
{{ "<|im_start|>system\n" ~ system ~ ("\n\n" if system and tools else "") }}
{%- if tools -%}
{{ HEAD ~ "\n" }}
{%- for tool in tools -%}
{{ about(tool.function if tool.function is defined else tool) }}
{%- endfor -%}
{{ "</tools>" ~ HOW_TO_CALL }}
{%- endif -%}
{{ "<|im_end|>\n" }}
{%- set place = namespace(asked=-1) -%}
{%- for m in rest -%}
{%- if m.role == "user" -%}{%- set place.asked = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in rest -%}
{%- set i = loop.index0 -%}
{%- if m.role == "assistant" -%}
{{ "<|im_start|>assistant\n" ~ body(m, not cut or i >= place.asked) ~ "<|im_end|>\n" }}
{%- elif m.role == "tool" -%}
{%- if i and rest[i - 1].role != "tool" -%}{{ "<|im_start|>user\n" }}{%- endif -%}
{{ "<tool_response>\n" ~ m.content ~ "\n</tool_response>\n" }}
{%- if loop.last or rest[i + 1].role != "tool" -%}{{ "<|im_end|>\n" }}{%- endif -%}
{%- else -%}
{{ "<|im_start|>" ~ m.role ~ "\n" ~ m.content }}
{%- if i == place.asked and low -%}{{ "\n\n{reasoning effort: low}" }}{%- endif -%}
{%- if i == place.asked and budget is defined and budget is not none -%}
{{ "\n\n{thinking token budget: " ~ budget ~ "}" }}
{%- endif -%}
{{ "<|im_end|>\n" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ "<|im_start|>assistant\n" ~ ("<think>\n" if thinking else "<think></think>") }}
{%- endif -%}
"""


def template(how_to_call=None):
    """chat_template.jinja: chat.render with the words of how_to_call, or our own, in it."""
    words = json.dumps(chat.HOW_TO_CALL if how_to_call is None else how_to_call)
    head = TEMPLATE.replace("HEAD", json.dumps(chat.TOOLS)).replace("HOW_TO_CALL", words)
    return "".join(line + "\n" for line in head.strip().splitlines())


def letters():
    """A visible character for every byte, ByteLevel's: itself, or the next free one from U+0100."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in seen]
    return dict(zip(seen + rest, map(chr, [*seen, *range(256, 256 + len(rest))])))


def tokenizer_json(enc):
    """A tiktoken.Encoding as the dict of a tokenizer.json."""
    ranks, letter = enc._mergeable_ranks, letters()
    visible = lambda token: "".join(letter[b] for b in token)
    by_id = sorted(ranks, key=ranks.get)
    merges = [list(map(visible, halves(t, ranks))) for t in by_id if len(t) > 1]
    special = sorted(enc._special_tokens.items(), key=lambda item: item[1])
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    cut = dict(type="Split", pattern=dict(Regex=enc._pat_str), behavior="Isolated", invert=False)
    same = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=[dict(id=i, content=s, **same) for s, i in special],
        normalizer=None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[cut, byte_level]),
        post_processor=None,
        decoder=byte_level,
        model=dict(
            type="BPE",
            dropout=None,
            unk_token=None,
            continuing_subword_prefix=None,
            end_of_word_suffix=None,
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=False,
            vocab={visible(t): ranks[t] for t in by_id},
            merges=merges,
        ),
    )


def beside(dir, enc, how_to_call=None):
    """Writes the three files into a folder of weights. The tokenizer has the template's tokens."""
    dir, end = Path(dir), enc._special_tokens.get(chat.END)
    if end is None:
        raise ValueError(
            f"the tokenizer {enc.name} has no {chat.END}: fine-tune first, with sft.py"
        )
    settings = dict(do_sample=True, temperature=1.0, top_p=0.95, eos_token_id=[end])
    texts = {
        "tokenizer.json": json.dumps(tokenizer_json(enc), ensure_ascii=False, indent=1) + "\n",
        "generation_config.json": json.dumps(settings, indent=2) + "\n",
        "chat_template.jinja": template(how_to_call),
    }
    for name, text in texts.items():
        (dir / name).write_text(text, encoding="utf-8")
