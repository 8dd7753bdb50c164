"""
The stack in one picture: the layers in order, what one layer does, what the MTP block adds.

    python docs/draw_stack.py     draws docs/stack.png, from Super's pattern and sizes in config.py

Sources   the released config.json, by way of config.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from config import LETTERS, Config
from plot import COLOURS, STYLE

KINDS = dict(zip("ME*-", COLOURS))
GREY = "0.35"


def box(ax, x, y, wide, high, text, size=11, fill="white", edge=GREY, **how):
    """A rounded box with its lower left corner at (x, y), and text in its middle."""
    corners = "round,pad=0,rounding_size=0.6"
    ax.add_patch(FancyBboxPatch((x, y), wide, high, corners, fc=fill, ec=edge, lw=1.2))
    middle = (x + wide / 2, y + high / 2)
    ax.text(*middle, text, ha="center", va="center", size=size, linespacing=1.35, **how)


def arrow(ax, start, end, **how):
    ax.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=GREY, lw=1.4) | how)


def heading(ax, y, text, size=13):
    ax.text(2, y, text, size=size, weight="bold", va="center")


def draw_layers(ax, c):
    """Every layer a cell, left to right, the first read first."""
    pattern = c.hybrid_override_pattern
    counts = ", ".join(f"{pattern.count(x)} {LETTERS[x]}" for x in "ME*-" if x in pattern)
    heading(ax, 63, f"{len(pattern)} layers, each one mixer: {counts}", size=15)
    box(ax, 2, 51.4, 9.5, 5.4, "tokens,\nembedding", size=10)
    left, cell = 13.5, 71.5 / len(pattern)
    for i, letter in enumerate(pattern):
        x = left + i * cell
        ax.add_patch(Rectangle((x, 51.4), cell * 0.86, 5.4, fc=KINDS[letter], lw=0))
        if letter == "*":
            ax.text(x + 0.43 * cell, 57.6, i, ha="center", size=11)
    ax.text(left - 2, 57.6, "attention at", size=11, ha="right")
    box(ax, 86.5, 51.4, 11.5, 5.4, "norm, head:\ntoken t+1", size=10)


def mixers(c):
    """(letter, what it does, its sizes) of the three kinds."""
    return (
        (
            "M",
            "fades, writes and reads\na state of fixed size",
            f"{c.mamba_num_heads} heads, each with a\n"
            f"{c.mamba_head_dim} x {c.ssm_state_size} state",
        ),
        (
            "*",
            "looks back at every token,\nwithout positions",
            f"{c.num_attention_heads} query heads,\n"
            f"{c.num_key_value_heads} key-value heads of {c.head_dim}",
        ),
        (
            "E",
            "a router sends a narrow copy of\n"
            f"the token to {c.num_experts_per_tok} of {c.n_routed_experts} experts",
            f"width {c.hidden_size:,} to {c.moe_latent_size:,} and back,\nbeside one shared expert",
        ),
    )


def draw_mixers(ax, c):
    heading(ax, 45.6, "One layer: x + mixer(norm(x))")
    for i, (letter, does, sizes) in enumerate(mixers(c)):
        x, colour = 2 + i * 32.75, KINDS[letter]
        name = f"{letter}   {LETTERS[letter]}"
        box(ax, x, 38.6, 30.5, 4.2, name, 12.5, colour, colour, color="white", weight="bold")
        box(ax, x, 25.8, 30.5, 12.2, f"{does}\n\n{sizes}", edge=colour)


def draw_mtp(ax, c):
    heading(ax, 20.4, "Several tokens at once: one MTP block, used again and again")
    box(ax, 2, 8, 17, 9.4, "the stack's\nstate at t")
    for k in range(1, c.depths + 1):
        x = 7 + 22 * k
        arrow(ax, (x - 10, 12.7), (x, 12.7))
        box(
            ax, x, 8, 12, 9.4, "MTP block\n" + "  ".join(c.mtp_hybrid_override_pattern), fill="0.92"
        )
        arrow(ax, (x + 6, 4), (x + 6, 8))
        ax.text(x + 6, 2.6, f"embedding of t+{k}", ha="center", va="center", size=10.5)
    arrow(ax, (x + 12, 12.7), (x + 17, 12.7), linestyle="dashed")
    said = ", ".join(f"t+{k + 1}" for k in range(1, c.depths + 1))
    text = f"trained to say {said};\nas a drafter it goes on,\nreading its own guesses"
    ax.text(x + 18, 12.7, text, va="center", linespacing=1.4)


def draw(c, out):
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(10, 6.6), layout="none")
        ax = fig.add_axes((0, 0, 1, 1), xlim=(0, 100), ylim=(0, 66), aspect="equal")
        ax.set_axis_off()
        for part in (draw_layers, draw_mixers, draw_mtp):
            part(ax, c)
        fig.savefig(out)


if __name__ == "__main__":
    draw(Config.preset("super"), ROOT / "docs" / "stack.png")
