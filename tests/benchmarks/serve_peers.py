"""Plain services that scanloom's is compared with: static batches around diffusers' scheduler, by Ray Serve, LitServe.

python tests/benchmarks/serve_peers.py ray|litserve PORT BATCH

Both take `POST /` (LitServe: `/predict`) with the same body as `POST /v1/images`, for one image without guidance.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

GENERATOR = "embedded://base"
WAIT_S, RAY_WAIT_S = 0.05, 2.5
"""For company. LitServe makes up a batch once the model is free, of all that came meanwhile. Ray Serve makes them up
all the time, and after a short wait each would hold one image: it waits about as long as a batch takes."""


class Pipeline:
    """What one writes without an engine: a batch runs as many steps as its longest image."""

    def __init__(self) -> None:
        import torch

        from scanloom.models.generator import load_generator

        torch.set_num_threads(1)
        self._generator = load_generator(GENERATOR)
        self([{"attributes": {}, "seed": 0, "steps": 2}])

    def __call__(self, asked: Sequence[Mapping[str, Any]]) -> list[bytes]:
        import numpy as np
        import torch

        from scanloom.sampling.noise import gaussian_noise
        from tests.benchmarks.engine_peers import bare_loop

        generator = self._generator
        noise = np.stack([gaussian_noise(each["seed"], 0, generator.latent_shape) for each in asked])
        [images] = bare_loop(
            generator._network, generator._vae, dict(generator.schedule.settings), torch.from_numpy(noise),
            generator.condition([each["attributes"] for each in asked]), generator.null_condition(1), 1.0,
            max(each["steps"] for each in asked), len(asked),
        )  # fmt: skip
        return [_png(image) for image in images]


def _png(image: Any) -> bytes:
    import numpy as np
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(np.rint(image * 255.0).astype(np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def run_ray(port: int, batch: int) -> None:
    import ray
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import Response

    class Peer:
        def __init__(self) -> None:
            self._pipeline = Pipeline()

        @serve.batch(max_batch_size=batch, batch_wait_timeout_s=RAY_WAIT_S)
        async def make(self, asked: list[dict[str, Any]]) -> list[bytes]:
            # In a thread, so that requests are taken meanwhile.
            return await asyncio.to_thread(self._pipeline, asked)

        async def __call__(self, request: Request) -> Response:
            return Response(await self.make(await request.json()), media_type="image/png")  # type: ignore[arg-type]

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 1})(Peer).bind())
    print("ready", flush=True)  # noqa: T201
    signal.pause()


def run_litserve(port: int, batch: int) -> None:
    from tests.benchmarks.litserve_peer import run

    run(port, batch)


def main() -> None:
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    # SIGTERM ends what was started, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    kind, port, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    {"ray": run_ray, "litserve": run_litserve}[kind](port, batch)


if __name__ == "__main__":
    main()
