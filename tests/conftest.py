"""What all tests share: markers, one thread, offline tiktoken files, and real data where it lies at hand."""

import contextlib
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared" / "data"  # real data beside the checkout, on some machines
if "TIKTOKEN_CACHE_DIR" not in os.environ and (SHARED / "tiktoken").is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED / "tiktoken")
os.environ.setdefault("NO_COLOR", "1")

import pytest  # noqa: E402

import gpt  # noqa: E402,F401  (filters torch's warning about numpy before torch is imported)
import torch  # noqa: E402

torch.set_num_threads(1)  # models here are so small that a second thread only costs
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # by a shell that runs tests in the background; processes of
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests would inherit it, and never see a Ctrl-C


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; `make test-all` runs it")
    config.addinivalue_line("markers", "gpu: needs CUDA, skips without it")
    config.addinivalue_line("markers", "peer: compares with a package of requirements-peers.txt, skips without it")


@pytest.fixture
def real_data():
    """Return a function: file name -> path of real data, or skip the test with the reason."""

    def find(name):
        for folder in (os.environ.get("DATA_DIR"), SHARED):
            if folder and (Path(folder) / name).exists():
                return Path(folder) / name
        pytest.skip(f"{name} is neither in $DATA_DIR nor in {SHARED}")

    return find


@pytest.fixture
def stop_after(monkeypatch):
    """Return a function: n -> a context in which every run gets SIGTERM before its n-th look at Stop, one a step."""
    import train

    @contextlib.contextmanager
    def stopping(n, number=signal.SIGTERM):
        real = train.Stop.__bool__

        def look(stop):
            stop.looks = getattr(stop, "looks", 0) + 1
            if stop.looks == n:
                stop.signal = number
            return real(stop)

        with monkeypatch.context() as patch:
            patch.setattr(train.Stop, "__bool__", look)
            yield

    return stopping


@pytest.fixture
def gpt2_tokenizer():
    """Return tiktoken's GPT-2 tokenizer, or skip where its files are not cached."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("set TIKTOKEN_CACHE_DIR to a folder with GPT-2's vocabulary to run this offline")
    from tokenizer import load_tokenizer

    return load_tokenizer("gpt2")
