"""
nvfp4.py against what NVIDIA's own code computes (tests/golden/nvfp4.safetensors:
TransformerEngine's reference quantiser, Model Optimizer 0.47, on a CPU), against E2M1's table, and
against the product it stands for.

Bits are compared where bits are defined: codes, scales, amax, decoded numbers, the Hadamard
product, every random byte.
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, rms
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import four_bits
import latent_moe
import nvfp4
import train
from model import Config, Nemotron
from nvfp4 import E2M1, Recipe, dequantize, export_weight, hadamard, quantize
from quant import lowbit
from quant.lowbit import Operands, matmul

G = load_file(ROOT / "tests" / "golden" / "nvfp4.safetensors")
MSE = load_file(ROOT / "tests" / "golden" / "nvfp4_mse.safetensors")  # Model Optimizer's sweep
INPUTS = sorted(k.split("/")[0] for k in G if k.endswith("/te1d.q"))
R = lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(got, want):
    """Bit for bit; -0 is 0."""
    if got.dtype == torch.float8_e4m3fn:
        got = got.view(torch.uint8)
    return got.shape == want.shape and got.dtype == want.dtype and bool((got == want).all())


def faults(name, quantize=quantize):
    """Which tensors of a golden input come out with another bit."""
    x, wrong = G[f"{name}/x"], []
    for kind, tile in (("te1d", (1, 16)), ("te2d", (16, 16))):
        q, t = quantize(x, tile), quantize(x.T.contiguous(), tile)
        got = dict(q=q.codes, s=q.scales, amax=q.amax, dq=dequantize(q), qT=t.codes, sT=t.scales)
        wrong += [f"{kind}.{k}" for k, v in got.items() if not same(v, G[f"{name}/{kind}.{k}"])]
    return wrong


@pytest.mark.parametrize("name", INPUTS)
def test_the_format_is_transformer_engines(name):
    assert not faults(name)


@pytest.mark.parametrize("name", [n for n in INPUTS if f"{n}/rht.xT" in G])
def test_the_rotation_is_transformer_engines(name):
    x = G[f"{name}/x"]
    turned = hadamard(x.T.contiguous())
    assert same(turned, G[f"{name}/rht.xT"]) and same(hadamard(x, 0).T, turned)
    q = quantize(turned)
    assert (
        same(q.codes, G[f"{name}/rht.qT"])
        and same(q.scales, G[f"{name}/rht.sT"])
        and same(q.amax, G[f"{name}/rht.amax"])
    )


def test_the_rotation_is_orthogonal_and_has_the_published_matrix():
    eye = hadamard(torch.eye(16))
    assert (
        same(eye.bfloat16(), G["tables/rht_matrix_bf16"])
        and nvfp4.SIGNS == G["tables/rht_sign"].tolist()
    )
    a, b = R(8, 64).double(), R(8, 64, seed=1).double()
    assert rms(hadamard(a) @ hadamard(b).T, a @ b.T) < 1e-14


def test_every_random_byte_rounds_as_transformer_engine():
    """256 bytes for 126 numbers. `code` was made with one fma; ours rounds the same sum once, by
    another road.
    """
    x, want = G["sr/x"], G["sr/code"]
    noise = torch.arange(256, dtype=torch.uint8).expand(len(x), 256)
    y = x[:, None].expand(-1, 256)
    q = nvfp4.to_grid(y.contiguous(), noise)
    code = torch.bucketize(q.abs(), E2M1).to(torch.uint8) | (y < 0).to(torch.uint8) << 3
    assert same(code, want)


def test_nearest_is_the_table():
    """Every midpoint goes to the even code, its neighbours in fp32 to their own side."""
    middle = (E2M1[1:] + E2M1[:-1]) / 2
    for i, m in enumerate(middle):
        below, above = (torch.nextafter(m, torch.tensor(v)) for v in (0.0, 9.0))
        got = nvfp4.to_grid(torch.stack([below, m, above, -m]))
        even = E2M1[i + i % 2]
        assert got.tolist() == [E2M1[i], even, E2M1[i + 1], -even]
    x = torch.linspace(-7, 7, 100_001)
    near = (x.abs()[:, None] - E2M1).abs()
    ties = (near == near.min(1, keepdim=True)[0]).sum(1) > 1
    assert torch.equal(nvfp4.to_grid(x.clone())[~ties], (E2M1[near.argmin(1)] * x.sign())[~ties])


def by_hand(x, amax):
    """One block of 16, element by element, in Python's doubles rounded to fp32 where the rule
    rounds.
    """
    import struct

    fl = lambda v: struct.unpack("f", struct.pack("f", v))[0]
    S = fl(2688 / amax) if amax else 1.0
    s = float(
        torch.tensor(min(fl(max(map(abs, x)) * fl(S * fl(1 / 6))), 448)).to(torch.float8_e4m3fn)
    )
    e = fl(1 / fl(s * fl(1 / S))) if s else nvfp4.BIG
    tests = (
        (0.25, False),
        (0.75, True),
        (1.25, False),
        (1.75, True),
        (2.5, False),
        (3.5, True),
        (5, False),
    )
    return s, [
        sum(abs(v) * e > m or (even and fl(abs(v) * e) == m) for m, even in tests) + 8 * (v < 0)
        for v in x
    ]


@given(st.integers(0, 10**6), st.integers(-20, 20))
def test_the_definition_block_by_block(seed, exponent):
    x = R(3, 32, seed=seed) * 2.0**exponent
    x[1, :16] = 0
    q = quantize(x)
    codes = torch.stack([q.codes & 15, q.codes >> 4], -1).flatten(1)
    for i in range(3):
        for j in range(2):
            s, want = by_hand(x[i, 16 * j : 16 * j + 16].tolist(), float(q.amax))
            assert float(q.scales[i, j]) == s and codes[i, 16 * j : 16 * j + 16].tolist() == want


def test_zeros_infinity_and_what_is_refused():
    for x in (torch.zeros(16, 32), torch.zeros(16, 32).bfloat16()):
        q = quantize(x)
        assert (
            not q.codes.any()
            and not q.scales.view(torch.uint8).any()
            and torch.equal(dequantize(q), torch.zeros(16, 32))
        )
        for nothing in (x, torch.eye(16, 32) * 1e-44):  # of which fp32 has no 2688th part
            for method in ("max", "mse"):
                w, s, two = export_weight(nothing, method)
                assert not w.any() and s.float().isfinite().all() and two == 0
    for bad, why in (
        (torch.ones(4, 17), "does not divide"),
        (torch.ones(2, 2, 16), "does not divide"),
        (torch.full((1, 16), math.nan), "16 of 16 elements are NaN or infinite"),
        (
            torch.tensor([[math.inf, -math.inf, *[1.0] * 14]]),
            "2 of 16 elements are NaN or infinite",
        ),
    ):
        with pytest.raises(ValueError, match=why):
            quantize(bad)
    with pytest.raises(ValueError, match="does not divide"):
        quantize(torch.ones(8, 16), (16, 16))
    with pytest.raises(ValueError, match="noise is"):
        quantize(torch.ones(1, 16), noise=torch.zeros(1, 16))
    with pytest.raises(ValueError, match="mxfp4 has no kernel"):
        Recipe.read("mxfp4", fast=True)
    with pytest.raises(ValueError, match="max or mse"):
        export_weight(torch.ones(1, 16), "best")


@pytest.mark.parametrize("name", [n for n in INPUTS if not n.startswith("zeros")])
def test_export_is_model_optimizers(name):
    q, s, two = export_weight(G[f"{name}/x"])
    assert (
        same(q, G[f"{name}/mo.q"]) and same(s, G[f"{name}/mo.s"]) and same(two, G[f"{name}/mo.s2"])
    )
    if f"{name}/mse.q" in G:
        q, s, two = export_weight(G[f"{name}/x"], "mse")
        assert (
            same(q, G[f"{name}/mse.q"])
            and same(s, G[f"{name}/mse.s"])
            and same(two, G[f"{name}/mse.s2"])
        )


def test_the_sweep_over_scales_breaks_ties_as_model_optimizers_does():
    """Ten inputs, in most of them blocks of one loud number, which two scales fit equally well.
    With the scale rounded once, as two's multiple, some of these blocks take the other."""
    other = 0
    for name in sorted({k.split("/")[0] for k in MSE}):
        x = MSE[f"{name}/x"]
        for got, what in zip(export_weight(x, "mse"), ("q", "s", "s2")):
            assert same(got, MSE[f"{name}/mse.{what}"]), (name, what)
        other += int((rounded_once(x).view(torch.uint8) != MSE[f"{name}/mse.s"]).sum())
    assert other > 100


def rounded_once(x):
    """The sweep with scales fl(v * two): what this file held before it met such blocks."""
    x = x.float().reshape(len(x), -1, 16)
    values = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    sigma = (values.float() * (x.abs().max() / 2688))[:, None, None, None]
    loss = (x - nvfp4.to_grid(x / sigma) * sigma).square().sum(-1)
    return values[loss.argmin(0)]


@pytest.mark.parametrize("amax", [1e-37, 6 * 2.0**-24, 1.0, 1e30])
def test_the_sweep_is_finite_and_never_worse_than_max(amax):
    x = R(32, 64, seed=3)
    x *= amax / x.abs().max()

    def error(method):
        q, s, two = export_weight(x, method)
        assert s.float().isfinite().all() and two.isfinite()
        sigma = s.double().repeat_interleave(16, 1) * two.double()
        return float((nvfp4.unpack(q).double() * sigma - x.double()).norm() / x.double().norm())

    assert error("mse") <= error("max") * (1 + 1e-6) < 0.2


def test_fp8_export_keeps_the_bf16_step():
    q, scale = nvfp4.export_fp8(G["fp8/w"])
    assert same(q, G["fp8/q"]) and same(scale, G["fp8/scale"])
    assert not same((G["fp8/w"].float() / scale).to(torch.float8_e4m3fn), G["fp8/q"])


def test_swizzle_is_the_published_formula():
    s = (torch.arange(200 * 10) % 127).to(torch.uint8).view(200, 10)
    flat = nvfp4.swizzle(s.view(torch.float8_e4m3fn)).view(torch.uint8)
    r, c = torch.meshgrid(torch.arange(200), torch.arange(10), indexing="ij")
    at = ((r // 128 * 3 + c // 4) * 32 + r % 32) * 16 + r % 128 // 32 * 4 + c % 4
    assert (
        flat.shape == (256 * 12,)
        and torch.equal(flat[at], s)
        and int(flat.int().sum()) == int(s.int().sum())
    )


def test_the_three_products_are_transformer_engines():
    g = {k: G[f"gemm/{k}"] for k in ("x", "w", "dy", "y", "dx", "dw")}
    x, w = g["x"].float().requires_grad_(), g["w"].float().requires_grad_()

    class Bf16(Operands):  # the vectors are bf16, and so is their rotation
        def operand(self, name, x, *rest):
            return super().operand(name, x.bfloat16(), *rest)

    y = matmul(x, w[None], None, Bf16(Recipe(sr=False)))
    y.backward(g["dy"].float())
    for got, want in ((y, g["y"]), (x.grad, g["dx"]), (w.grad, g["dw"])):
        assert (got - want).abs().max() < 1e-6 * want.abs().max()


def test_stochastic_rounding_has_the_right_mean():
    """10,000 draws each: within 4 standard errors of x minus the known bias, at most 1/256 of a
    step; never all zeros.
    """
    x, n = torch.linspace(-6, 6, 97), 10_000
    torch.manual_seed(0)
    draws = nvfp4.to_grid(
        x[:, None].expand(-1, n).contiguous(), nvfp4.random_bytes(torch.empty(97, n)).view(97, n)
    )
    step = nvfp4.binade(x.clone().clamp(-6, 6)) / 2
    want = (
        x.sign()
        * (torch.floor(x.abs() / step) + torch.floor(256 * (x.abs() / step % 1)) / 256)
        * step
    )
    error = draws.std(1) / n**0.5
    assert ((draws.mean(1) - want).abs() <= 4 * error + 1e-6).all()
    assert ((want - x).abs() < step / 256 + 1e-6).all()
    assert draws.any(1)[x != 0].all()


def product(x, w, recipe=None, count=None, seed=0):
    torch.manual_seed(seed)
    recipe = recipe or Recipe()
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = matmul(x, w, count, Operands(recipe))
    y.backward(R(*y.shape, seed=9))
    return y.detach(), x.grad, w.grad


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-2d", "nvfp4-rht", "nvfp4-sr", "mxfp4", "mxfp8"])
def test_each_product_is_near_the_exact_one(recipe):
    """Two operands of four bits: errors add in quadrature, 9.5 % sqrt(2) on normals; stochastic
    ones are larger.
    """
    x, w, dy = R(100, 72), R(1, 40, 72, seed=1), R(100, 40, seed=9)
    y, dx, dw = product(x, w, Recipe.read(recipe))
    limit = 0.06 if recipe == "mxfp8" else 0.21
    for got, want in ((y, x @ w[0].T), (dx, dy @ w[0]), (dw[0], dy.T @ x)):
        assert (0.01 if recipe == "mxfp8" else 0.1) < rms(got, want) < limit


def test_every_ingredient_does_something():
    x, w = R(64, 64) * R(64, 1, seed=2).exp(), R(1, 32, 64, seed=1) * R(1, 32, 1, seed=3).exp()
    full = product(x, w)
    changes = {
        "nvfp4-2d": (0, 1),
        "nvfp4-rht": (2,),
        "nvfp4-sr": (1, 2),
        "mxfp4": (0, 1, 2),
        "mxfp8": (0, 1, 2),
    }
    for text, products in changes.items():
        other = product(x, w, Recipe.read(text))
        assert (
            tuple(i for i in range(3) if not torch.equal(full[i], other[i])) == products
            or text == "nvfp4-rht"
        ), text
    for other in ("nvfp4-rht",):  # fprop does not know of rht; dgrad neither
        assert torch.equal(product(x, w, Recipe.read(other))[0], full[0])
    with pytest.raises(ValueError, match="there is no 'warp'"):
        Recipe.read("nvfp4-warp")


def test_tiles_transpose_exactly():
    w = R(64, 96)
    a, b = quantize(w, (16, 16)), quantize(w.T.contiguous(), (16, 16))
    assert torch.equal(dequantize(a), dequantize(b).T)
    assert not torch.equal(dequantize(quantize(w)), dequantize(quantize(w.T.contiguous())).T)


@pytest.mark.parametrize("recipe", ["nvfp4-sr", "nvfp4-2d-rht-sr", "mxfp4-sr"])
def test_stacked_experts_are_separate_linears(recipe):
    """Every expert as if it were alone, amax and blocks of tokens included; also without a token,
    and with all.
    """
    w, r = R(5, 40, 24, seed=1) * torch.arange(1.0, 6)[:, None, None], Recipe.read(recipe)
    for count in ([7, 0, 33, 1, 16], [0, 57, 0, 0, 0]):
        x = R(57, 24)
        y, dx, dw = product(x, w, r, torch.tensor(count))
        dy, first = R(57, 40, seed=9), 0
        for e, n in enumerate(count):
            part = slice(first, first + n)
            first += n
            if not n:
                assert not dw[e].any()
                continue
            a, b = x[part].clone().requires_grad_(), w[e : e + 1].clone().requires_grad_()
            one = matmul(a, b, None, Operands(r))
            one.backward(dy[part])
            for got, want in ((y[part], one), (dx[part], a.grad), (dw[e], b.grad[0])):
                assert rms(got, want) < 1e-6


@pytest.mark.parametrize("element", ["mxfp4", "mxfp8"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_mx_hides_no_number_that_is_not_finite(element, bad):
    x = torch.randn(2, 64)
    x[1, 40] = bad
    rows = nvfp4.mx(x, (1, 32), element).reshape(2, 2, 32)
    assert rows[1, 1].isnan().any() and rows[0].isfinite().all() and rows[1, 0].isfinite().all()


def test_mx_formats_are_ocps():
    """Blocks of 32 share a power of two: floor for four bits, so 6/4 of the largest may saturate;
    ceil for eight.
    """
    x = R(16, 64) * 100
    for element, top, scale in (
        ("mxfp4", 6, lambda a: 2.0 ** (math.floor(math.log2(a)) - 2)),
        ("mxfp8", 448, lambda a: 2.0 ** math.ceil(math.log2(a / 448))),
    ):
        got = nvfp4.mx(x, (1, 32), element).view(16, 64)
        for i in range(16):
            for j in (0, 32):
                block = x[i, j : j + 32]
                s = scale(float(block.abs().max()))
                if element == "mxfp4":
                    want = nvfp4.to_grid(block / s) * s
                else:
                    want = (block / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s
                assert torch.equal(got[i, j : j + 32], want)
        assert got.abs().max() <= top * scale(float(x.abs().max()))
    assert (
        not nvfp4.mx(torch.zeros(1, 32), (1, 32), "mxfp4").any()
        and not nvfp4.mx(torch.zeros(1, 32), (1, 32), "mxfp8").any()
    )


def test_the_reference_windows():
    """The relative errors of N(0, 1), 1024 x 1024, that every right implementation has."""
    x = R(1024, 1024)
    for got, low, high in (
        (dequantize(quantize(x)), 0.0949, 0.0954),
        (dequantize(quantize(x, (16, 16))), 0.1110, 0.1116),
        (nvfp4.mx(x, (1, 32), "mxfp4").view_as(x), 0.1147, 0.1153),
    ):
        assert low < rms(got, x) < high


def test_super_is_converted_as_it_was_trained():
    with torch.device("meta"):
        model = Nemotron(Config.preset("super"))
    swapped = lowbit.convert(model)
    kinds = {}
    for name, format in swapped.items():
        kinds.setdefault((name.rsplit(".", 1)[-1], format), []).append(int(name.split(".")[2]))
    pattern = model.config.hybrid_override_pattern[:74]  # 14 of 88 stay
    E, M = ([i for i, x in enumerate(pattern) if x == letter] for letter in "EM")
    assert kinds == {
        ("in_proj", "nvfp4"): M,
        ("out_proj", "mxfp8"): M,
        ("experts", "nvfp4"): E,
        ("up_proj", "nvfp4"): E,
        ("down_proj", "nvfp4"): E,
    }


def small(seed=0):
    return Nemotron(
        Config.preset("toy").__class__(
            **{
                **Config.preset("toy").__dict__,
                "hybrid_override_pattern": "ME*EM",
                "hidden_size": 48,
                "vocab_size": 64,
                "moe_latent_size": 24,
                "moe_intermediate_size": 40,
                "moe_shared_expert_intermediate_size": 56,
                "num_nextn_predict_layers": 1,
                "n_routed_experts": 16,
                "num_experts_per_tok": 4,
                "routed_scaling_factor": 2.5,
                "initializer_range": 0.04,
            }
        ),
        seed,
    )


def test_a_converted_model_is_the_same_model_with_other_products():
    model, plain = small(), small()
    swapped = lowbit.convert(model, Recipe(last=0.2))
    assert (
        set(swapped.values()) == {"nvfp4", "mxfp8"}
        and "backbone.layers.4.mixer.in_proj" not in swapped
    )
    assert [(n, p.shape) for n, p in model.named_parameters()] == [
        (n, p.shape) for n, p in plain.named_parameters()
    ]
    assert model.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 64, (2, 33))
    loss = lambda m: F.cross_entropy(m(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    lowbit.watch(model)
    for m in (model, plain):
        loss(m).backward()
    for (name, p), _q in zip(model.named_parameters(), plain.parameters()):
        if p.grad is not None:
            assert p.grad.dtype == torch.float32 and p.grad.isfinite().all(), name
    assert 0 < rms(model(ids), plain(ids)) < 0.2
    shares = lowbit.diagnose(model)
    assert {"fprop_x", "fprop_w", "dgrad_dy", "wgrad_dy", "wgrad_x"} < set(shares)
    assert (
        all(0 <= v < 0.2 for v in shares.values())
        and shares["fprop_w"] > 0.005
        and shares["dead_channels"] == 0
    )
    with torch.no_grad():
        for m in latent_moe.layers(model)[:1]:
            m.experts.up_proj[:, :4] = 0
            m.experts.down_proj[:, :, :2] = 0
    every = sum(m.experts.up_proj[..., 0].numel() for m in latent_moe.layers(model))
    assert lowbit.diagnose(model)["dead_channels"] == 16 * 2 / every
    cache = model.eval().new_cache(2)  # and it decodes
    assert (
        model(ids[:, :20], cache).isfinite().all() and model(ids[:, 20:21], cache).isfinite().all()
    )


def test_under_autocast_the_output_is_bf16_and_the_gradient_fp32():
    layer = lowbit.Linear(torch.nn.Parameter(R(48, 32)), Recipe())
    x = R(5, 7, 32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert (
        y.dtype == torch.bfloat16
        and layer.weight.grad.dtype == torch.float32
        and x.grad.shape == x.shape
    )
    assert rms(y.float(), x @ layer.weight.T) < 0.2


def toy(tmp_path, name, **more):
    tiny = (
        "hybrid_override_pattern=ME*EM,hidden_size=32,mamba_num_heads=2,n_routed_experts=4,num_experts_per_tok=2,"
        "moe_latent_size=16,moe_intermediate_size=32,moe_shared_expert_intermediate_size=32,num_nextn_predict_layers=0"
    )
    lines = []
    run = train.Run(
        name=name,
        out=str(tmp_path),
        model=tiny,
        data="recall",
        tokenizer="bytes",
        batch=4,
        length=32,
        eval_every=8,
        save_every=5,
        eval_tokens=256,
        log_every=1,
        prompt="",
        worth=False,
        device="cpu",
        **{"steps": 8, **more},
    )
    model, rows = train.fit(run, say=lines.append)
    return model.state_dict(), rows, "\n".join(lines)


def test_random_bytes_belong_to_their_place():
    """A row's bytes are the same whoever draws it; another step, piece, matrix, operand or row has
    others; and all 256 come equally often."""
    noise, rows = lowbit.Noise(), torch.arange(4096)

    def bytes_of(matrix="a", operand="dgrad dy", rows=rows, columns=32, **now):
        vars(noise).update(dict(step=3, place=0, pieces=2, piece=0) | now)
        return noise.at(matrix, rows)(operand, columns)

    x = bytes_of()
    assert torch.equal(bytes_of(rows=rows[70:90]), x[70:90])
    assert torch.equal(bytes_of(place=1), bytes_of(piece=2)) and x.dtype == torch.uint8
    assert torch.equal(bytes_of(columns=16), x[:, :16])
    others = [
        bytes_of(step=4),
        bytes_of(piece=1),
        bytes_of(matrix="b"),
        bytes_of(operand="wgrad dy"),
        bytes_of(rows=rows + 4096),
        x.roll(1, 1),
        x.roll(1, 0),
    ]
    for y in others:
        assert abs(float((x == y).double().mean()) * 256 - 1) < 0.1
    each = x.flatten().long().bincount(minlength=256).double()
    assert float(((each - 512) ** 2 / 512).sum()) < 340  # chi squared of 255: 1 in 4,000 above
    later = noise.at("a", rows[:4])
    noise.piece = 1
    assert torch.equal(later("dgrad dy", 32), bytes_of(rows=rows[:4], **dict(piece=0)))


def test_training_resumes_and_changes_precision(tmp_path):
    """8 steps are 5 and 3 more, random bytes included; from fp32 to four bits and back is a flag,
    and is said.
    """
    whole, rows, text = toy(tmp_path, "a", precision="nvfp4", diagnose=True)
    assert (
        "products in NVFP4" in text
        and "1 products in MXFP8" in text
        and 0 < rows[-1]["fprop_x"] < 0.5
    )
    toy(tmp_path, "b", precision="nvfp4", stop=5)
    parts, again, text = toy(tmp_path, "b", precision="nvfp4", resume=True)
    assert all(torch.equal(whole[k], parts[k]) for k in whole) and " up to step" not in text
    toy(tmp_path, "c", precision="fp32", stop=5)
    other, rows, text = toy(tmp_path, "c", precision="nvfp4", resume=True, diagnose=True)
    assert "fp32 up to step 5, nvfp4 from here" in text and "zero_gradients" in text
    assert not all(torch.equal(whole[k], other[k]) for k in whole) and math.isfinite(
        rows[-1]["train_nats"]
    )
    assert (
        "nvfp4 up to step 8, fp32 from here"
        in toy(tmp_path, "c", precision="fp32", resume=True, steps=9)[2]
    )
    with pytest.raises(ValueError, match="'int4' is not spelled as"):
        toy(tmp_path, "d", precision="int4")


def test_the_errors_are_in_their_windows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    four_bits.main()
    text = capsys.readouterr().out
    assert (tmp_path / "runs" / "nvfp4.png").stat().st_size > 10_000
    for line in text.splitlines():
        if " to " in line and line.startswith("  NVFP4") or line.startswith("  MXFP4"):
            low, high = map(float, line.split()[-3::2])
            assert low <= float(re.search(r"\d\.\d\d +(\d+\.\d\d)", line)[1]) <= high, line


def test_this_file_can_fail(monkeypatch):
    """Each wrong order of operations that NVFP4 implementations in the wild have turns a golden
    input red.
    """
    assert not any(faults(name) for name in INPUTS)
    right = nvfp4.scales

    def before_2_15(amax, block):
        S = torch.full_like(amax, 2688) / amax
        s = (block / 6 * S).clamp(max=448).to(torch.float8_e4m3fn).float()
        return s, (s * S.reciprocal()).reciprocal().clamp(max=nvfp4.BIG)

    def divided(amax, block):
        s, e = right(amax, block)
        return s, torch.full_like(amax, 2688) / amax / s

    def floored(amax, block):
        s, e = right(amax, block)
        return s.clamp(min=2**-9), e

    for wrong in (before_2_15, divided, floored):
        monkeypatch.setattr(nvfp4, "scales", wrong)
        assert any(faults(name) for name in INPUTS), wrong.__name__
    monkeypatch.setattr(nvfp4, "scales", right)
    monkeypatch.setattr(nvfp4, "to_grid", lambda y, noise=None: (y.clamp_(-6, 6) * 2).round() / 2)
    assert faults("normal_16x16_f32")
