"""The data owner's side: holds the data and everything that trains. Never imports `cloud_node`.

What loops of one's own begin with is imported when it is first asked for: the commands start without it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_client.drop_in import connect, head, modules

__all__ = ["connect", "head", "modules"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from edge_client import drop_in

    return getattr(drop_in, name)
