"""Settings that every test shares, made before torch is imported."""

import os
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
# compiled kernels outlive a test run, so that the next one is quick
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))
# peers (transformers) must not ask a hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# jax is a witness on the CPU only
os.environ.setdefault("JAX_PLATFORMS", "cpu")
