"""
Two corpora of others, fetched once: `python data.py --download shakespeare`, or fineweb.

Not here  anything that runs without being asked: nothing else of this project uses the network
Sources   karpathy/char-rnn; kjj0/fineweb10B-gpt2, token files in llm.c's layout
"""

import shutil
import urllib.request
from hashlib import sha256
from pathlib import Path

from corpora.tokenfiles import layout

DATA = Path(__file__).resolve().parent.parent / "data"  # where --download writes
URLS = {
    "shakespeare": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
    "fineweb": "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/",
}
SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # its sha256


def fetch(name, shards=1):
    """To a temporary name, checked, then renamed: what stands in data/ is whole."""
    files = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i + 1:06}.bin" for i in range(shards)]
    files = {"input.txt": "shakespeare.txt"} if name == "shakespeare" else dict(zip(files, files))
    DATA.mkdir(exist_ok=True)
    for there, here in files.items():
        path, part = DATA / here, DATA / (here + ".part")
        if not path.exists():
            with (
                urllib.request.urlopen(URLS[name] + there, timeout=60) as source,
                open(part, "wb") as sink,
            ):
                shutil.copyfileobj(source, sink)
            if (
                name == "shakespeare"
                and (got := sha256(part.read_bytes()).hexdigest()) != SHAKESPEARE
            ):
                raise ValueError(f"{URLS[name]}{there} has sha256 {got}, not {SHAKESPEARE}")
            if name == "fineweb" and layout(part)[2] == 0:  # no checksum is published
                raise ValueError(f"{URLS[name]}{there} does not start like a token file")
            part.replace(path)
        print(f"{path}: {path.stat().st_size:,} bytes")
