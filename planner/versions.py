"""Library versions against those that are modelled: what differs is said, never assumed away.

The modelling code, peft and bitsandbytes are modelled as of the spec's default versions, which are
also those of the records; torch from 2.11 on, whose later releases the tests trace.
"""

from __future__ import annotations

import re
from functools import lru_cache

from planner.spec import RunSpec, Versions

MODELLED = Versions.model_construct()


def version_notes(spec: RunSpec) -> tuple[str, ...]:
    """A line for every library of the run whose release line (major.minor) is another than the
    modelled one; empty where all are the modelled ones."""
    told = []
    for library in _libraries(spec):
        given, known = getattr(spec.versions, library), getattr(MODELLED, library)
        if release_line(given) == release_line(known):
            continue
        if library == "torch" and release_line(given) > release_line(known):
            told.append(f"torch {given}: no records of it ({known} is measured); interval widened")
        else:
            age = "older" if release_line(given) < release_line(known) else "newer"
            told.append(
                f"{library} {given} is {age} than the modelled {known}: answered as {known}, "
                "interval widened; what differs may lie outside it"
            )
            if library == "bitsandbytes" and keeps_4bit_inputs(spec):
                told.append(
                    "bitsandbytes before 0.43.2 keeps the inputs of 4-bit linears: counted "
                    "(checkpointing taken as reentrant)"
                )
    return tuple(told)


KEPT_4BIT_INPUTS_UNTIL = (0, 43, 2)  # bitsandbytes pull request 1270, 16 July 2024


def keeps_4bit_inputs(spec: RunSpec) -> bool:
    """Whether the run's bitsandbytes keeps the input of every 4-bit linear for backward."""
    return _kept_4bit_inputs(spec.versions.bitsandbytes)


@lru_cache(maxsize=4)
def _kept_4bit_inputs(bitsandbytes: str) -> bool:
    parts = [int(part) for part in re.findall(r"\d+", bitsandbytes)[:3]]
    return (*parts, 0)[:3] < KEPT_4BIT_INPUTS_UNTIL


def release_line(version: str) -> tuple[int, ...]:
    """'2.11.0+cu130' -> (2, 11)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:2])


def _libraries(spec: RunSpec) -> list[str]:
    """The libraries that the run uses."""
    libraries = ["torch", "transformers", "accelerate"]
    if spec.method == "lora":
        libraries.append("peft")
    eight_bit_or_paged = re.search("bnb|8bit|paged|lion|ademamix", spec.optimizer)
    if spec.quantization != "none" or eight_bit_or_paged:
        libraries.append("bitsandbytes")
    return libraries
