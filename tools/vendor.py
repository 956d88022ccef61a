"""Rebuild the WebGL library of the explorer's page from npm: `python tools/vendor.py [--cache DIR] [--verify]`.

The page uses six functions of twgl.js (MIT). esbuild takes them and what they need out of the package, readable
and not minified, so that the file can be checked in and read. Both packages come by `npm pack` from the registry
that npm is set to, each must have the SHA-256 that stands below, and nothing of them is installed or run but
esbuild's binary (Linux on x86-64; its output does not depend on the platform). `--verify` writes nothing and says
whether the file in the repository is what the packages give.

Why not regl-scatterplot, which draws such maps ready-made: regl assembles its drawing functions with `Function`,
which a page whose Content-Security-Policy has no 'unsafe-eval' refuses.
"""

import argparse
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

STATIC = Path(__file__).resolve().parents[1] / "src" / "nnclr" / "explorer" / "static"
LIBRARY = ("twgl.js", "7.0.0", "cbdc45e1886acfcbae499f4749e2307d5aa7d190649d3bf1e7926b4571a549a2")
BUNDLER = ("@esbuild/linux-x64", "0.25.12", "f7efc127658a108dcda9d4210b01804ee8f5d6b3acbd6d63f20aa51d3b50bd5f")
ENTRY = """export {
  createProgramInfo, createBufferInfoFromArrays, setAttribInfoBufferFromArray, setBuffersAndAttributes, setUniforms,
  drawBufferInfo,
} from "./package/dist/7.x/twgl-full.module.js";
"""
BANNER = "/* twgl.js 7.0.0 (MIT, see twgl.LICENSE), the parts that map.js uses; made by tools/vendor.py. */"


def fetch(name: str, version: str, sha256: str, cache: Path) -> Path:
    """Archive of a package, brought by npm if it is not there, with its hash verified."""
    archive = cache / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", f"{name}@{version}", "--pack-destination", str(cache)], check=True)
    if hashlib.sha256(archive.read_bytes()).hexdigest() != sha256:
        sys.exit(f"vendor: {archive} is not {name}@{version}: its SHA-256 differs")
    return archive


def build(cache: Path) -> dict[str, bytes]:
    """File name in static/ -> content."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with tarfile.open(fetch(*LIBRARY, cache)) as archive:
            archive.extractall(folder, filter="data")
        with tarfile.open(fetch(*BUNDLER, cache)) as archive:
            archive.extract("package/bin/esbuild", folder / "esbuild", filter="data")
        (folder / "entry.js").write_text(ENTRY)
        binary = folder / "esbuild" / "package" / "bin" / "esbuild"
        binary.chmod(0o755)
        flags = ["--bundle", "--format=esm", "--target=es2020", "--legal-comments=inline", f"--banner:js={BANNER}"]
        subprocess.run([binary, "entry.js", *flags, "--log-level=error", "--outfile=out.js"], cwd=folder, check=True)
        return {
            "twgl.js": (folder / "out.js").read_bytes(),
            "twgl.LICENSE": (folder / "package" / "LICENSE.md").read_bytes(),
        }


def main() -> None:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep the packages here, and take those that are")
    parser.add_argument("--verify", action="store_true", help="write nothing; fail if the files differ")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cache = options.cache or Path(scratch)
        cache.mkdir(parents=True, exist_ok=True)
        built = build(cache)
    for name, content in built.items():
        path = STATIC / name
        if not options.verify:
            path.write_bytes(content)
        elif not path.exists() or path.read_bytes() != content:
            sys.exit(f"vendor: {path} is not what the packages give")
        print(f"{path.name}: {len(content):,} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
