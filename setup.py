"""What the package is and needs. Tools are configured in pyproject.toml, exact versions are in
constraints.txt.

The shipped recipes and models live in top-level `configs/`, and the batch script in `slurm/`, where
people look for them; a wheel gets a copy of them inside the package, because nothing outside of it
is installed.
"""

import ast
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

REQUIRES = [
    "torch>=2.11",
    "megatron-core==0.16.1",
    # The engine needs these two without saying so: without psutil a checkpoint save hangs.
    "psutil",
    "einops",
    "numpy",
    "pydantic>=2.9",
    "omegaconf>=2.3",
    "pyyaml",
    "tensorboard",
    "safetensors",
    # Older ones do not tell transparency (has_transparency_data) and have no scalable font; AVIF
    # pictures need 11.3.
    "pillow>=10.1",
    # Older ones make special tokens of text that spells them (encode_special_tokens).
    "tokenizers>=0.15.1",
    "rich",
    # Decodes JPEG in half of Pillow's time, and refuses what is damaged when asked to.
    "simplejpeg>=1.8",
    # Renders the chat templates of other models.
    "jinja2>=3.1",
    # Its list of licences came with this one.
    "packaging>=24.2",
]
VIDEO = ["av>=14"]
PDF = ["pypdfium2>=5"]
PARQUET = ["pyarrow>=15"]
DEMO = ["scikit-learn", "scikit-image", "matplotlib"]
RELEASE = ["transformers>=5.10", "matplotlib", "huggingface_hub"]
EXTRAS = {
    # Transformer Engine's torch binding is compiled on installation, against a CUDA torch.
    "gpu": ["transformer-engine[pytorch,core_cu13]>=2.7", "nvidia-dali-cuda130>=2"],
    "mpi": ["mpi4py>=4"],
    "video": VIDEO,
    "pdf": PDF,
    "parquet": PARQUET,
    "demo": DEMO,
    "release": RELEASE,
    "dev": [
        *DEMO,
        *RELEASE,
        *VIDEO,
        *PDF,
        *PARQUET,
        "pytest",
        "pytest-xdist",
        "ruff",
        "mypy",
        "import-linter",
        # Open MPI itself, so that starting by mpirun is tested without a system package.
        "mpi4py>=4",
        "openmpi>=5",
        "types-PyYAML",
        "types-psutil",
    ],
}


SHIPPED = ["configs/**/*.yaml", "slurm/train.sbatch"]


class BuildWithShipped(build_py):
    """Adds the files of `SHIPPED` to the package, as `megatron_vlm/configs/` and so on."""

    def run(self) -> None:
        super().run()
        # An editable install reads the checkout's own files.
        if not self.editable_mode:
            for source, target in self._shipped():
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(source), target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return super().get_outputs(include_bytecode) + [target for _, target in self._shipped()]

    def _shipped(self) -> list[tuple[Path, str]]:
        files = sorted(path for pattern in SHIPPED for path in ROOT.glob(pattern))
        package = Path(self.build_lib) / "megatron_vlm"
        return [(path, str(package / path.relative_to(ROOT))) for path in files]


def _version() -> str:
    """`__version__`, read without importing the package: its needs are not installed yet."""
    for node in ast.parse((ROOT / "megatron_vlm" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise RuntimeError("megatron_vlm/__init__.py defines no __version__")


readme = ROOT / "README.md"

setup(
    name="megatron-vlm",
    version=_version(),
    description="Train vision-language mixture-of-experts models, from a laptop to a cluster",
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_vlm", "megatron_vlm.*"]),
    package_data={
        "megatron_vlm": [
            "py.typed",
            "data/look/sheet.*s",
            "release/hub/*.py",
            "release/hub/*.jinja",
        ]
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mvlm=megatron_vlm.cli.main:main"]},
    cmdclass={"build_py": BuildWithShipped},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
)
