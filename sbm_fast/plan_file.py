"""Plans as .npz files: the arrays, and a JSON header. No pickles.

Format 2 added ``log_std`` and ``threshold``; a file of format 1 is a plan without them.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields

import numpy as np

from sbm_fast.plan import Plan

_FORMAT = 2
_LACKING = {1: ("log_std", "threshold"), 2: ()}
"""Format → arrays that it does not have yet."""


def save(plan: Plan, path: str | os.PathLike[str]) -> None:
    """See :meth:`sbm_fast.plan.Plan.save`."""
    header = {
        "format": _FORMAT,
        "method": plan.method,
        "description": plan.description,
        "start_scale": plan.start_scale,
    }
    arrays = {name: getattr(plan, name) for name in plan.arrays()}
    with open(path, "wb") as file:
        np.savez(file, header=np.array(json.dumps(header)), **arrays)


def load(path: str | os.PathLike[str]) -> Plan:
    """See :meth:`sbm_fast.plan.Plan.load`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(str(file["header"]))
            found = header.pop("format")
            known = {field.name for field in fields(Plan)} - set(Plan.arrays())
            if found not in _LACKING or set(header) != known:
                raise ValueError(f"format {found!r}, this version reads 1 to {_FORMAT}")
            arrays = {name: file[name] for name in Plan.arrays() if name not in _LACKING[found]}
        return Plan(**header, **arrays)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"path: {os.fspath(path)!r} is not a saved plan ({error})") from error
