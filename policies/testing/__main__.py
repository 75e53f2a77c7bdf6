"""``python -m kvtune.policies.testing`` prints the golden choices as JSON."""

from __future__ import annotations

import json

from kvtune.policies.testing.golden import golden

print(json.dumps(golden(), indent=2))
