"""Ray programs, one file each: `python -m jobs.prepare`, `encode`, `finetune`, `generate`.

Ray reads these variables once, while it is imported, so that they are settled here, before any job imports Ray.
"""

import os
import secrets

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# A terminal shows the job's progress; what Ray says of its own is in its session's log files.
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "WARNING")
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "PYTHON worker processes have been started")
# How often Ray Train takes a report from its workers: one that finds the former still there stops training until then.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
# Ray Data reads the footers of Parquet files in actors of their own, by default more processes than a small machine has
# cores, at every read. What a job starts itself is one machine, for which one of them, with its many threads, will do.
os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
if os.environ["RAY_AUTH_MODE"] == "token" and not os.environ.get("RAY_ADDRESS"):
    # A local cluster of the job's own gets a token of its own, which its processes alone inherit.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
