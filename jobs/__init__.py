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
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
# Ray Data reads the footers of Parquet files in actors of their own, by default more processes than a small machine has
# cores, at every read. What a job starts itself is one machine, for which one of them, with its many threads, will do.
os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
# What Ray's own processes do beside a job's work on a cluster that the job starts itself, whose cores the workers need.
OWN_CLUSTER = {
    # Its log monitor searches for new log files ten times a second and sends their lines to drivers, which show none.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "3600",
    # Its agent measures processes, disks and network, by default every five seconds. Gauges of jobs are not among them.
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    # Records of tasks and of event loops, for a dashboard that there is none of.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    # An actor that looks for nodes about to be reclaimed: this one would take the job with it.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Every process that waits for work wakes a hundred times a second. By default as many are kept as CPUs are free.
    "RAY_num_workers_soft_limit": "0",
    "RAY_idle_worker_killing_time_threshold_ms": "10000",
}
if not os.environ.get("RAY_ADDRESS"):
    os.environ.update(OWN_CLUSTER | os.environ)
    if os.environ["RAY_AUTH_MODE"] == "token":
        # A local cluster of the job's own gets a token of its own, which its processes alone inherit.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
