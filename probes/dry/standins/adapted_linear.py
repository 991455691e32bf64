"""The recipes' own fused linear: its body, run under the recorder, tells its temporaries."""

from __future__ import annotations

from typing import Any

from probes.dry.standins import stands_for


@stands_for("vramwise::adapted_linear", "vramwise::adapted_linear_backward")
def adapted_linear(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The Python function behind the operation, on meta tensors."""
    from recipes import fused

    body = getattr(fused, func._schema.name.partition("::")[2])._init_fn
    with recorder:
        return body(*args, **kwargs)
