"""Licences by their SPDX identifiers, and as a model card's front matter names them."""

from __future__ import annotations

import re

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from megatron_vlm.errors import ConfigError

OTHER = "other"

# Of the identifiers that the hub's front matter takes, those that are SPDX's in lower case; it
# refuses any that it does not know.
_HUB = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 ecl-2.0 epl-1.0
    epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gpl-2.0 gpl-3.0 isc lgpl-2.1 lgpl-3.0 lppl-1.3c mit
    mpl-2.0 ms-pl ncsa ofl-1.1 osl-3.0 postgresql unlicense wtfpl zlib
    """.split()
)


def parse_licence(text: str | None) -> str | None:
    """The licence's identifier as SPDX spells it, or `other`; null if none was given.

    Raises:
        ConfigError: it is neither.
    """
    if text is None or text.lower() == OTHER:
        return text and OTHER
    try:
        found = str(canonicalize_license_expression(text))
    except InvalidLicenseExpression:
        found = ""
    if not found or re.search(r"\s|^LicenseRef-", found):
        raise ConfigError(
            f"--licence {text}: expected an SPDX identifier such as Apache-2.0 or MIT, or {OTHER}"
        )
    return found


def front_matter(licence: str | None) -> dict[str, str]:
    """The fields of a model card that tell the licence."""
    if licence is None:
        return {"license": OTHER, "license_name": "none-given"}
    if licence == OTHER:
        return {"license": OTHER}
    known = re.sub(r"-(only|or-later)$", "", licence.lower())
    if known in _HUB:
        return {"license": known}
    return {"license": OTHER, "license_name": licence.lower()}
