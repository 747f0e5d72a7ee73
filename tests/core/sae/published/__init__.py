"""Small files written the way each publisher writes them, with what the publisher computes from them.

`CASES` is also the source of the table of formats: `layout`, `publisher`, `what`, `verified_by`. Where the publisher's
package is installed, its classes write the files and say what the codes are; else the formula is
written out in float64.
"""

from tests.core.sae.published import dictionaries, language, saelens, vision
from tests.core.sae.published.base import CASES

__all__ = ["CASES", "dictionaries", "language", "saelens", "vision"]
