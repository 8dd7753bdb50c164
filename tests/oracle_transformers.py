"""
What transformers' NemotronH computes: python oracle_transformers.py DIR. The other end of
tests/test_hf.py.

It needs a process of its own: transformers imports a package `kernels`, which our folder of that
name would hide. DIR/jobs.json lists {name, ids, config}, and DIR/NAME/ours holds a model that
hf.save wrote. For each job

    ours     from_pretrained(DIR/NAME/ours): its logits for ids, and six greedy tokens (unless the
             job says greedy: false)
    theirs   a model of `config` with random numbers everywhere: the same, and save_pretrained in
             both spellings,
             DIR/NAME/theirs (backbone., one tensor per expert) and DIR/NAME/stacked (model.,
             experts stacked)

The answers go to DIR/answers.safetensors, what AutoConfig reads from each of our config.json to
DIR/configs.json, every name that its configuration takes to DIR/names.json.
"""

import inspect
import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import save_file


@torch.no_grad()
def shake(model, seed, layers):
    """Sets every tensor to numbers of a size that matters: initial values hide errors (biases of 0,
    norms of 1).

    What writes into the residual stream is divided by sqrt(layers), as in training. Without it 88
    layers of anyone's fp32 are 1e-5 away from fp64.
    """
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.state_dict().items()):
        x = torch.randn(p.shape, generator=g)
        if name.endswith("A_log"):
            x = (8 * torch.rand(p.shape, generator=g) + 0.2).log()
        elif name.endswith("dt_bias"):
            x = 2 * x - 2  # softplus of it: 0.003 to 2, mostly
        elif name.endswith("e_score_correction_bias"):
            x = 0.2 * x  # enough to change who is chosen
        elif "norm" in name:
            x = 1 + 0.3 * x
        elif p.ndim > 1 and "embeddings" not in name:
            x = x * p.shape[-1] ** -0.5
        if any(part in name for part in ("o_proj", "out_proj", "down_proj", "fc2_latent_proj")):
            x = x * layers**-0.5
        p.copy_(x)


@torch.no_grad()
def answer(model, ids, greedy=True):
    """{"": logits, ".greedy": six tokens}. Their generate wants an attention layer, for the
    length.
    """
    model.eval()
    said = {"": model(ids, use_cache=False).logits}
    if greedy:
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        said[".greedy"] = out[:, ids.shape[1] :].contiguous()
    return said


def main(dir):
    assert not any(Path(p, "hf.py").exists() for p in sys.path), (
        "our files would hide packages of the same name"
    )
    from transformers import AutoConfig, NemotronHForCausalLM
    from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig

    taken = re.findall(r'"(\w+)" in kwargs', inspect.getsource(NemotronHConfig.__post_init__))
    names = [f.name for f in fields(NemotronHConfig)] + taken + list(NemotronHConfig.attribute_map)
    (dir / "names.json").write_text(json.dumps(names))
    answers, configs = {}, {}
    loop = dict(experts_implementation="eager")  # its loop over experts, for any shape
    for seed, job in enumerate(json.loads((dir / "jobs.json").read_text())):
        here, ids = dir / job["name"], torch.tensor(job["ids"])
        model, info = NemotronHForCausalLM.from_pretrained(
            here / "ours", output_loading_info=True, **loop
        )
        assert not any(info.values()), info  # nothing missing, unexpected, mismatched
        said = answer(model, ids, job.get("greedy", True))
        answers |= {job["name"] + ".ours" + what: x for what, x in said.items()}
        c = AutoConfig.from_pretrained(here / "ours")
        configs[job["name"]] = dict(
            c.to_dict(),
            hybrid_override_pattern=c.hybrid_override_pattern,
            mtp_hybrid_override_pattern=c.mtp_hybrid_override_pattern,
        )
        model = NemotronHForCausalLM(NemotronHConfig(**job["config"], **loop))
        shake(model, seed, model.config.num_hidden_layers)
        said = answer(model, ids, job.get("greedy", True))
        answers |= {job["name"] + ".theirs" + what: x for what, x in said.items()}
        model.save_pretrained(here / "theirs")
        model.save_pretrained(here / "stacked", save_original_format=False)
    save_file(answers, dir / "answers.safetensors")
    (dir / "configs.json").write_text(json.dumps(configs, default=str))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
