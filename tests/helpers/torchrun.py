"""Programs as users start them."""

import subprocess
import sys


def torchrun(code, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    logs = ["--log-dir", str(tmp_path), "--redirects", "1"]  # on one standard output, lines of two ranks may mix
    done = subprocess.run([*launcher, *logs, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return "".join(path.read_text() for path in tmp_path.rglob("stdout.log"))
