"""Ray programs, one file each: `python -m jobs.prepare`, `encode`, `finetune`, `generate`.

Ray reads its authentication mode once, while it is imported, so that it is settled here, before any job imports Ray.
"""

import os
import secrets

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if os.environ["RAY_AUTH_MODE"] == "token" and not os.environ.get("RAY_ADDRESS"):
    # A local cluster of the job's own gets a token of its own, which its processes alone inherit.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
