"""What a written report holds."""

from __future__ import annotations

import json
import re
from pathlib import Path


def data_of(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])
