"""What jobs of the GPU benchmark may do: succeed, fail, crash, hang. Run in processes of their own."""

import os
import signal
import time

from gpu_jobs import Report, Skipped


def every_end(report: Report) -> None:
    """Cases that end in every way, each once, whichever process of the job gets to it."""
    for name in ("good", "crashes", "raises", "skips", "hangs", "last"):
        if not report.wants(name):
            continue
        with report.case(name):
            if name == "crashes":
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "raises":
                raise ValueError("it cannot be\nfor many reasons")
            if name == "skips":
                raise Skipped("it is not for here")
            if name == "hangs":
                time.sleep(60)
            report.add(name, value=1.0)


def good_then_hangs(report: Report) -> None:
    """One case that ends, and one that does not."""
    with report.case("good"):
        report.add("good", value=1.0)
    with report.case("hangs"):
        time.sleep(60)


def ends_early(report: Report) -> None:
    """Ends before it begins anything."""
    raise SystemExit("no such device")
