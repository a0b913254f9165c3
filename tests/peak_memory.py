"""The beginning of a program that measures the peak of its own anonymous memory."""

from __future__ import annotations

# `anonymous()`: the anonymous memory now, in bytes. `watch()`, in a thread: raises `peak` until `done`.
WATCH = """
import threading, time

def anonymous():
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
"""
