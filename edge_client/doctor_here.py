"""What `doctor` looks at on this machine: the identity's files, the proxy, and room for the model's ends.

Knows files and the environment; speaks to nobody.
"""

import os
import shutil
import time
from pathlib import Path

from edge_client.examined import Patient, Verdict
from edge_client.opening import checked_credentials
from isthmus import receiver
from isthmus.errors import BundleError
from isthmus.report.units import size
from isthmus.trust.proxy import proxy_for

DAY_S = 86400.0
SOON_S = 3 * DAY_S
"""A certificate that is valid for less is warned of."""

TIMES_ENDS = 3.0
"""Memory for the ends' weights as stored, once more in float32, and what training holds beside them, roughly."""


def identity(patient: Patient) -> Verdict:
    """The files of --certs: there, readable, closed to others, in date, belonging together."""
    patient.credentials = checked_credentials(patient.server, patient.certs, patient.insecure)
    if patient.credentials is None:
        if patient.insecure:
            return Verdict(
                "warn", "--insecure: whoever is between can read and change all; use --certs DIR where you can"
            )
        return Verdict("pass", "none is needed: plaintext to this machine")
    patient.credentials.publisher()
    return expiring(f"{patient.certs}", patient.credentials.expires(), "ask the model owner to issue it anew")


def expiring(what: str, until_s: float, remedy: str) -> Verdict:
    """Whether a certificate that is valid now will be for long."""
    left_s = until_s - time.time()
    until = time.strftime("%Y-%m-%d", time.gmtime(until_s))
    figures = {"days_left": round(left_s / DAY_S, 2)}
    if left_s < SOON_S:
        return Verdict("warn", f"{what} expires in {left_s / 3600:.0f} hours: {remedy}", figures)
    return Verdict("pass", f"{what} is valid until {until}", figures)


def proxy(patient: Patient) -> Verdict:
    """Whether gRPC goes through a proxy, and which variable says so."""
    found = proxy_for(patient.host)
    if found is None:
        return Verdict("pass", "none is in force for this address")
    return Verdict(
        "warn", f"{found} is in force: gRPC goes through it; if it should not, add {patient.host} to no_proxy"
    )


def room(patient: Patient) -> Verdict:
    """Free disk for the ends, unless they are here, and free memory for them.

    Raises:
        BundleError: the disk cannot take them.
    """
    offer = patient.described.cuts[0]
    publisher = patient.credentials.publisher() if patient.credentials is not None else None
    here = receiver.cached(patient.cache, offer.ends_bundle, publisher) is not None
    disk, memory = _free_disk(patient.cache), _free_memory()
    figures = {"ends_bytes": float(offer.ends_bytes), "free_disk_bytes": float(disk)}
    figures |= {"free_memory_bytes": float(memory)} if memory is not None else {}
    if not here and disk < offer.ends_bytes:
        raise BundleError(
            f"the ends of cut {offer.bottom}:{offer.top} take {size(offer.ends_bytes)} and {patient.cache} has "
            f"{size(disk)} free: make room, or set ISTHMUS_CACHE to another disk"
        )
    if memory is not None and memory < TIMES_ENDS * offer.ends_bytes:
        said = f"{size(memory)} of memory are free for ends of {size(offer.ends_bytes)}"
        return Verdict(
            "warn", f"{said}: close other programs, or ask the owner for a cut that leaves less here", figures
        )
    kept = "here already" if here else f"to be fetched, {size(disk)} of disk free"
    rest = f", {size(memory)} of memory free" if memory is not None else ""
    return Verdict("pass", f"ends of {size(offer.ends_bytes)} are {kept}{rest}", figures)


def _free_disk(place: Path) -> int:
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        raise BundleError(f"{place} cannot be written: change its owner, or set ISTHMUS_CACHE to another folder")
    return shutil.disk_usage(place).free


def _free_memory() -> int | None:
    """Bytes that a program may still take, as Linux tells them; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith("MemAvailable:")), None)
    return int(found[1]) << 10 if found is not None else None
