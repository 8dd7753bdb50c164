"""
Executes the notebooks where they lie, every cell anew from top to bottom, and keeps what came out.

    python notebooks/execute.py                    all of them
    python notebooks/execute.py 4_nvfp4.ipynb      one

What is kept is what another run here would give again: no times of execution, no seconds, no paths
of this machine. A cell that fails stops it, and the file stays as it was.

Not here  what the notebooks say: the files themselves; whether they run: tests/test_notebooks.py
Sources   nbclient, as Jupyter itself executes
"""

import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import command

import disk
from bounds import knob

LONGEST = 1800  # seconds a cell may take: a busy machine is slow
METADATA = dict(
    kernelspec=dict(display_name="Python 3", language="python", name="python3"),
    language_info=dict(name="python"),
)


@dataclass(frozen=True)
class Flags:
    names: tuple = knob((), "which notebooks; none: all", place=True)


def execute(notebook, folder):
    """Runs every cell of a notebook (nbformat's) in a kernel that starts in `folder`. The first
    error is raised: CellExecutionError, with the cell in it.
    """
    from nbclient import NotebookClient

    where = dict(metadata=dict(path=str(folder)))
    client = NotebookClient(notebook, timeout=LONGEST, record_timing=False, resources=where)
    imports = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    client.execute(env={**os.environ, "PYTHONPATH": imports})
    return notebook


def clean(notebook):
    """Takes out what another run would not give again."""
    notebook.metadata = METADATA
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = joined(cell.outputs)
        for output in cell.get("outputs", ()):
            if "text" in output:
                output["text"] = lasting(output["text"])
            for kind, content in output.get("data", {}).items():
                if kind.startswith("text/"):
                    output["data"][kind] = lasting(content)
    return notebook


def joined(outputs):
    """What was printed in one breath may have come in two pieces: one again."""
    kept = []
    for output in outputs:
        piece = output.output_type == "stream"
        if piece and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def lasting(text):
    """A text without this machine's paths, and without its last line of seconds."""
    folder = re.escape(tempfile.gettempdir()) + r"/\w+/"
    return re.sub(r"\n *\d+ s in all|; \d+ s(?=<)", "", re.sub(folder, "", text))


def work(flags):
    import nbformat

    for path in [HERE / name for name in flags.names] or sorted(HERE.glob("*.ipynb")):
        try:
            notebook = nbformat.read(path, 4)
        except ValueError as e:
            raise ValueError(f"{path} is no notebook: {e}") from None
        command.say(f"{path.name}: {sum(c.cell_type == 'code' for c in notebook.cells)} cells")
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, folder)
        text = nbformat.writes(clean(notebook)) + "\n"
        disk.write(path, lambda f, text=text: f.write(text.encode()))
        command.say(f"           {path.stat().st_size / 1000:.0f} kB")


def main(argv=None):
    command.run(work, Flags, "notebooks/execute.py", __doc__, argv)


if __name__ == "__main__":
    main()
