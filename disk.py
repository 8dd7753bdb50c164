"""
A run's folder, written so that a kill at any moment loses nothing that was already there.

    runs/<name>/config.json          the run's settings, the model's config, hashes, versions,
                                     hardware
    runs/<name>/log.csv, load.json   one row per logged step; where the experts' tokens went
    runs/<name>/ckpt/step-*.pt       checkpoints
    .../left-1-*, left-2-* ...       what a run had come to before it went back

    write     a file, under another name, forced to the disk, and renamed: the rename is when it
              exists
    lock      one writer a folder; the operating system's lock, which dies with its holder
    resume    what to paste into a shell to go on with a run
    write_log, read_log    rows of numbers as a csv, and back
    sources   what exactly was run

Not here  what is in a checkpoint, and whether it is whole: checkpoint.py; where a run may begin,
          and what is set aside: training/safety.py
"""

import contextlib
import csv
import errno
import hashlib
import io
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import command

# Where this project's own files are.
WINGS = (
    "",
    "classroom/",
    "corpora/",
    "kernels/",
    "quant/",
    "scale/",
    "speed/",
    "post/",
    "training/",
)


# 1. A file, a folder


def write(path, save):
    """Calls save(f) on a temporary file, then renames it to path: path is whole, or still what it
    was.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as f:
            save(f)
            f.flush()
            os.fsync(f.fileno())  # on the disk before the name is
        os.replace(temporary, path)
    except OSError as e:
        if str(e.filename) == str(temporary):
            e.filename = str(path)  # the name that was asked for
        raise
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            temporary.unlink()


def grasp(f):
    """Whether the operating system gives us, and nobody else, this open file."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            return False
        said = f"{f.name}: no locks on this file system; see that one process writes here"
        warnings.warn(said, stacklevel=2)
    return True


@contextlib.contextmanager
def lock(folder):
    """One writer a folder, until the block is left or the process dies, however it dies: then the
    operating system opens the lock, and an empty .lock that is left over means nothing. The folder
    is made, and removed again if it stays empty. ValueError if another process holds it.
    """
    path = Path(folder) / ".lock"
    made = [p for p in (Path(folder), *Path(folder).parents) if not p.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "a+b") as f:
            if not grasp(f):
                raise ValueError(f"{folder} is in use: another process is writing into it")
            if not (path.exists() and os.path.samestat(os.fstat(f.fileno()), path.stat())):
                continue  # its last holder has just removed it
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # Windows: not while it is open
                    path.unlink()
                for p in made:
                    with contextlib.suppress(OSError):
                        p.rmdir()
            return


# 2. The command that goes on


def resume(folder, *flags):
    """The command that goes on with the run in a folder, ready for a shell: its program, its place,
    its name, its text.
    """
    folder, home = Path(folder), Path(__file__).resolve().parent
    about = {}
    with contextlib.suppress(OSError, ValueError):
        about = command.document(folder / "config.json")
    program, run = str(about.get("program", "train.py")), about.get("run")
    typed = Path(sys.argv[0]).name == program and sys.argv[0]
    near = program if Path(program).resolve() == home / program else str(home / program)
    given = dict(out=str(folder.parent), name=folder.name)
    if isinstance(run, dict) and run.get("data", "python") != "python":
        given["data"] = str(run["data"])
    line = [typed or near]
    for k, v in given.items():
        line += [f"--{k}={v}"] if v.startswith("-") else [f"--{k}", v]
    return quoted([*starter(), *line, "--resume", *flags])


def below(out, name):
    """The folder `name` under `out`; ValueError for a name that leads out of it, or nowhere."""
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute() or Path(name).drive:
        raise ValueError(f"--name {name!r} names no folder under --out {out}")
    return Path(out) / name


def starter():
    """How this process was started: by a python, or by torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        found = shutil.which("python")
        same = found and Path(found).parent == Path(sys.executable).parent
        return ["python" if same else sys.executable]
    here, nodes = os.environ["LOCAL_WORLD_SIZE"], os.environ.get("GROUP_WORLD_SIZE", "1")
    where = ["--master-addr", os.environ["MASTER_ADDR"], "--master-port", os.environ["MASTER_PORT"]]
    return [
        "torchrun",
        *(["--nnodes", nodes, *where] if nodes != "1" else []),
        *("--nproc-per-node", here),
    ]


def quoted(words):
    """Words as a shell takes them."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


# 3. The log, and what was run


def table(rows):
    """Rows (dicts; what one lacks is an empty cell) as the text of a csv."""
    text = io.StringIO(newline="")
    out = csv.DictWriter(text, dict.fromkeys(k for r in rows for k in r), restval="")
    out.writeheader()
    out.writerows(
        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows
    )
    return text.getvalue()


def write_log(path, rows):
    """`table`, whole or not at all."""
    write(path, lambda f: f.write(table(rows).encode()))


def cell(text):
    """A number as `table` writes it: 3 is an integer; 3.0, 3e5, nan and inf are none. '' is ''."""
    if text == "":
        return text
    return float(text) if set(text) & set(".enai") else int(text)


def read_log(path):
    """A csv as a list of dicts of numbers; an empty cell stays empty."""
    with open(command.ending_file(path), newline="", encoding="utf-8-sig") as f:
        rows = csv.DictReader(f, restval="")
        try:
            return [{k: cell(v) for k, v in r.items() if k is not None} for r in rows]
        except (ValueError, csv.Error) as e:
            raise ValueError(f"{path}, line {rows.line_num}: {e}") from None


def sources():
    """What exactly was run: sha256 of this project's own files, and the git commit if there is
    one.
    """
    here, digest = Path(__file__).resolve().parent, hashlib.sha256()
    for f in sorted(f for wing in WINGS for f in here.glob(f"{wing}*.py")):
        digest.update(f.read_bytes())
    commit = None
    if (here / ".git").exists() and shutil.which("git"):
        git = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True
        )
        commit = git.stdout.strip() if git.returncode == 0 else None
    return dict(sources_sha256=digest.hexdigest(), git=commit)


if __name__ == "__main__":
    import command

    command.part("python train.py")
