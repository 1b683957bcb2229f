"""What cloud-init finds in a guest: the data source NoCloud, a CD-ROM image with the label `cidata`.

meta-data says who the guest is, user-data what its owner wants done, network-config how it reaches the network. User
data is handed on as it is; it is not parsed, only its beginning must be one that cloud-init knows, because cloud-init
itself would ignore anything else with no more than a warning in the guest's log.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from ovt.errors import UsageError
from ovt.image.iso9660 import iso as iso
from ovt.model import Seed

LABEL = "cidata"
_CLOUD_CONFIG = "#cloud-config"
# cloudinit/handlers: INCLUSION_TYPES_MAP, by their first line; jinja templates say what they are in the second
_HEADERS = (
    _CLOUD_CONFIG,
    "#cloud-config-archive",
    "#cloud-config-jsonp",
    "#cloud-boothook",
    "#include",
    "#include-once",
    "#part-handler",
    "## template: jinja",
)
_MIME = re.compile(r"\A(?:[!-9;-~]+:[^\n]*\n(?:[ \t][^\n]*\n)*)*mime-version:", re.IGNORECASE)
_SSH_KEY = re.compile(r"(?:^| )(?:ssh|ecdsa|sk-ssh|sk-ecdsa)-[\w@.-]+ +AAAA[\w+/=]+(?: |$)")


def make(seed: Seed, hostname: str, instance_id: str) -> bytes:
    """The CD-ROM image for a guest: the same bytes for the same arguments.

    `instance_id` is what cloud-init takes for a new machine when it changes; the seed's own goes before it. UsageError
    for user data, vendor data, a network configuration or SSH keys that cloud-init would not take.
    """
    check(seed)
    meta = {"instance-id": seed.instance_id or instance_id, "local-hostname": hostname}
    files = {
        "meta-data": _yaml(meta, "public-keys", seed.ssh_keys),
        "user-data": seed.user_data or _default_user_data(hostname, seed.ssh_keys),
    }
    if seed.vendor_data:
        files["vendor-data"] = seed.vendor_data
    if seed.network_config:
        files["network-config"] = seed.network_config
    return iso(LABEL, {name: text.encode() for name, text in files.items()})


def check(seed: Seed) -> None:
    """UsageError when cloud-init would not take what stands in `seed`."""
    for what, text in (("user data", seed.user_data), ("vendor data", seed.vendor_data)):
        if text and not _known(text):
            first = text.split("\n", 1)[0][:60]
            raise UsageError(
                f"the {what} begin with {first!r}, which cloud-init does not know",
                f"begin with one of {', '.join(_HEADERS)}, #!INTERPRETER, or be a MIME message",
            )
    if seed.network_config and not re.search(r"(?:^|[\s{\"'])version[\"']?\s*:\s*[\"']?[12]\b", seed.network_config):
        raise UsageError(
            "the network configuration names no version", "cloud-init takes version 1 or 2: begin with `version: 2`"
        )
    for number, key in enumerate(seed.ssh_keys, 1):
        if not key.isprintable() or not _SSH_KEY.search(key):
            raise UsageError(f"SSH key {number} is not a public key", "give one line of a .pub file for each key")


def _known(text: str) -> bool:
    first = text.split("\n", 1)[0].rstrip()
    return first.lower() in _HEADERS or first.startswith("#!") or bool(_MIME.match(text))


def _default_user_data(hostname: str, ssh_keys: Sequence[str]) -> str:
    return f"{_CLOUD_CONFIG}\n" + _yaml({"hostname": hostname}, "ssh_authorized_keys", ssh_keys)


def _yaml(entries: dict[str, str], key: str, values: Sequence[str]) -> str:
    """A YAML mapping of texts, and a list if it is not empty; JSON's quoted strings are YAML's too."""
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in entries.items()]
    if values:
        lines += [f"{key}:", *(f"  - {json.dumps(value, ensure_ascii=False)}" for value in values)]
    return "\n".join(lines) + "\n"
