"""Packaging of owl_wms; tool settings stand in pyproject.toml, tried version sets in requirements*.txt."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="owl_wms",
    version="0.1.0",
    description="Fast, verified VAE decoding for real-time world models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["owl_wms", "owl_wms.*"]),
    package_data={"owl_wms": ["py.typed", "ops/**/*.cu", "ops/**/*.cuh", "inference/page/*"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11,<2.12",
        "filelock>=3.18,<5",
        "numpy>=2.0,<3",
        "pillow>=11,<14",
        "platformdirs>=4.3,<5",
        "pydantic>=2.10,<3",
        "pyyaml>=6.0,<7",
        "rich>=13.9,<16",
        "safetensors>=0.5,<1",
        "typer>=0.15,<1",
    ],
    extras_require={
        "tensorrt": ["torch-tensorrt==2.11.0", "tensorrt>=10.15.1,<10.16"],
        "rtx": ["torch-tensorrt-rtx==2.11.0", "tensorrt-rtx==1.4.0.76"],
        "train": ["boto3>=1.35,<2", "wandb>=0.18,<1"],
        "media": ["av>=14,<19"],
        "play": ["aiohttp>=3.12,<4", "av>=14,<19"],
        "hub": ["diffusers>=0.34,<0.43", "huggingface-hub>=1.0,<3"],
        "metrics": ["prometheus-client>=0.21,<1"],
        "dev": [
            "hypothesis>=6.120,<7",
            "matplotlib>=3.9,<4",
            "mypy>=1.13,<3",
            "psutil>=6,<8",
            "pytest>=8.3,<10",
            "pytest-timeout>=2.3,<3",
            "ruff>=0.9,<1",
        ],
    },
    entry_points={"console_scripts": ["owl-wms = owl_wms.cli:main"]},
)
