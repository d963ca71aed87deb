"""URLs of item images: which ones the web page shows, and the hosts that its content security policy allows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from llmrec.types import Item

IMAGE_FIELDS = ("image", "image_url", "image_link")
"""Item fields that hold the URL of an image, in order of preference; without them no page loads images."""
MAX_ORIGINS = 20
"""Maximum number of origins in a policy, so that its header stays below the limits of reverse proxies."""
# A host name with a domain, so that no image is requested from an IP address or a machine of the reader's network, and
# only characters that cannot end a directive of the policy. No user names, quotes or spaces.
_URL_PATTERN = re.compile(
    r"(https?://(?:[a-z0-9-]{1,63}\.)+[a-z][a-z0-9-]{0,62}(?::\d{1,5})?)(?:[/?#][!#$%&'()*+,./0-9:;=?@A-Z_a-z~-]*)?",
    re.IGNORECASE | re.ASCII,
)
_MAX_FIELD_LENGTH = 2000
# Names that are never hosts of the web.
_LOCAL_DOMAINS = (".localhost", ".local", ".internal", ".home.arpa", ".lan", ".intranet", ".corp", ".home")


def item_image_url(fields: Mapping[str, str]) -> str | None:
    """Return the URL of an item's image, http or https; None without a valid one."""
    urls = (_first_value(fields[name]) for name in IMAGE_FIELDS if name in fields)
    return next((url for url in urls if _url_origin(url)), None)


def common_image_origins(items: Iterable[Item]) -> tuple[str, ...]:
    """Return the origins of the images of items, such as ``https://images.example.com``; the most common ones first."""
    counts = Counter(origin for item in items if (url := item_image_url(item.fields)) and (origin := _url_origin(url)))
    return tuple(origin for origin, _ in counts.most_common(MAX_ORIGINS))


def _first_value(value: str) -> str:
    """Return the first value of a field; several are separated by a comma and a space."""
    return value.strip().split(", ", 1)[0] if len(value) <= _MAX_FIELD_LENGTH else ""


def _url_origin(url: str) -> str | None:
    match = _URL_PATTERN.fullmatch(url)
    if not match:
        return None
    origin = match[1].lower()
    host = origin.partition("://")[2].partition(":")[0]
    return None if host.endswith(_LOCAL_DOMAINS) else origin
