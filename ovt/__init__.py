"""ovt: one tool and one library for a Linux host's guests.

import ovt
ovt.Host().run("busybox", ["true"])     # 0
"""

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ovt.host import Host

__all__ = ["Host", "__version__"]


def __getattr__(name: str) -> object:
    # on demand: the OCI runtime imports this package on every call and needs no host
    if name == "Host":
        from ovt.host import Host

        return Host
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
