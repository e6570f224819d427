"""Packaging; the exact versions the tests run with are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "malora_dist" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

setup(
    name="malora_dist",
    version=VERSION,
    description="Distributed expert-parallel fine-tuning of Llama with MALoRA (mixture of asymmetric LoRA)",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["malora_dist", "malora_dist.*"]),
    package_data={"malora_dist": ["py.typed"], "malora_dist.inspection": ["*.jinja"]},
    python_requires=">=3.11,<3.13",
    install_requires=[
        "torch>=2.10",
        "megatron-core>=0.16,<0.20",
        "transformers>=5,<6",
        "peft>=0.21,<0.22",
        "datasets",
        "safetensors",
        "tokenizers",
        "jinja2",  # chat templates
        "omegaconf>=2.4",
        "pyyaml",
        "tensorboard",
        "matplotlib",
        "tqdm",
        "rich",
        "numpy",
        "packaging",
    ],
    extras_require={
        "dev": ["pytest", "hypothesis>=6.100,<7", "psutil", "ruff", "mypy"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny>=3", "sqlalchemy", "alembic"],
    },
)
