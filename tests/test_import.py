from __future__ import annotations

from textwrap import dedent


def test_the_package_is_light(run_python):
    code = """
        import sys, lightning_largescale
        heavy = {"torch", "lightning", "numpy", "rich", "psutil"} & set(sys.modules)
        assert not heavy, heavy
        ours = {name for name in sys.modules if name.startswith("lightning_largescale.")}
        assert ours == {"lightning_largescale._autoload"}, ours
    """
    run_python(dedent(code))


def test_prices_and_the_search_need_no_torch(run_python):
    code = """
        import sys
        import lightning_largescale.prices, lightning_largescale.planner.search
        assert "torch" not in sys.modules
    """
    run_python(dedent(code))


def test_no_device_and_no_process_group(run_python):
    code = """
        import importlib, pkgutil, threading
        import torch, lightning.pytorch
        threads, state, count = threading.active_count(), torch.random.get_rng_state(), torch.get_num_threads()
        import lightning_largescale
        for module in pkgutil.walk_packages(lightning_largescale.__path__, "lightning_largescale."):
            importlib.import_module(module.name)
        assert not torch.cuda.is_initialized()
        assert not torch.distributed.is_initialized()
        assert threading.active_count() == threads
        assert torch.get_num_threads() == count
        assert torch.equal(torch.random.get_rng_state(), state)
    """
    assert run_python(dedent(code)) == ""
