"""Where the demo's results go: never lost, whatever happens to the folder in between."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from lasem_fast.demo import plots
from lasem_fast.lifelong import RunRecord

RUN, UNFINISHED = "run.json", "unfinished.json"
PICTURES = ("trade-off.png", "posterior.png", "share_frequency.png")


class Written(NamedTuple):
    """What became of the results: a line for the user, and the exit status."""

    message: str
    status: int


class Results:
    """The folder of a run.

    Raises:
        OSError: nothing can be written there.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._unwritable = ""
        try:
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=out):
                pass
        except OSError as error:
            raise OSError(
                f"--out: expected a folder that can be written, got {str(out)!r} "
                f"({error.strerror or error})"
            ) from error

    def keep(self, result: dict[str, Any]) -> None:
        """Writes what there is while the run goes on, beside the results of an earlier run."""
        try:
            _write_json(self.out / UNFINISHED, result)
            self._unwritable = ""
        except OSError as error:  # training goes on; the end will find another place
            self._unwritable = str(error)

    def kept(self) -> str:
        """Where that is which was kept last."""
        if self._unwritable:
            return f"what had ended could not be written: {self._unwritable}"
        return f"what had ended is in {self.out / UNFINISHED}"

    def write(self, result: dict[str, Any], search: RunRecord) -> Written:
        """Writes everything: to the folder, or else to a new one, or else to standard output.

        ``search``: the run that two of the pictures are of.
        """
        try:
            return Written(f"Written: {_write(self.out, result, search)}", 0)
        except OSError as error:
            failure = f"{self.out} cannot be written ({error.strerror or error})"
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix="lasem_fast-demo-"))
            return Written(f"{failure}. Written: {_write(elsewhere, result, search)}", 1)
        except OSError:
            json.dump(result, sys.stdout, allow_nan=False, default=str)
            return Written(f"\n{failure}; {RUN} is above.", 1)


def _write(out: Path, result: dict[str, Any], search: RunRecord) -> str:
    _write_json(out / RUN, result)
    trade_off, posterior, share_frequency = (out / name for name in PICTURES)
    plots.plot_trade_off(result["comparison"], trade_off)
    plots.plot_posterior(search, posterior)
    plots.plot_share_frequency(search, share_frequency)
    (out / UNFINISHED).unlink(missing_ok=True)
    return f"{', '.join((RUN, *PICTURES))} in {out}"


def _write_json(path: Path, result: dict[str, Any]) -> None:
    """All of it or nothing: what was there before stays until it is written."""
    text = json.dumps(result, indent=1, allow_nan=False, default=str) + "\n"
    beside = path.with_suffix(".partial")
    try:
        beside.write_text(text, encoding="ascii")
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
