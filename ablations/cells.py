"""
A cell's process: one thread, nothing shared with its neighbours, and an end when nobody waits.

    ask(figure, settings, seed)     starts one and waits -> measures, CPU seconds; a
                                    ChildProcessError if it fails
    answer(figure, order)           what that process does

Not here  which cells there are, and their rows: lab.py
"""

import json
import os
import subprocess
import sys
import threading
import time

from ablations.figure import ROOT


def ask(figure, settings, seed):
    """One cell, in a process of its own -> its measures, its CPU seconds."""
    order = json.dumps([settings, seed, os.getpid()])
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    line = [sys.executable, "-m", figure.home(), "--cell", order]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        raise ChildProcessError(f"failed, exit code {done.returncode}: see above")
    return json.loads(done.stdout.splitlines()[-1])


def answer(figure, order):
    """What `ask` asked for, on the last line. Ends when nobody waits for it any more."""
    settings, seed, *parent = json.loads(order)

    def watch():
        while os.getppid() == parent[0]:
            time.sleep(1)
        os._exit(1)

    if parent:
        threading.Thread(target=watch, daemon=True).start()
    measures = figure.cell(settings, seed)
    print(json.dumps([measures, time.process_time()]), flush=True)
