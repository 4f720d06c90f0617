import threading
import traceback

from lightning_largescale import compat


def test_frame_of():
    held, running = threading.Event(), threading.Event()

    def run():
        running.set()
        held.wait()

    thread = threading.Thread(target=run)
    assert compat.frame_of(thread) is None
    thread.start()
    running.wait()
    names = [frame.f_code.co_name for frame, _ in traceback.walk_stack(compat.frame_of(thread))]
    held.set()
    thread.join()
    assert "run" in names


def test_target_of():
    assert compat.target_of(threading.Thread(target=str)) is str
    assert compat.target_of(threading.Thread()) is None
    thread = threading.Thread(target=str)
    thread.start()
    thread.join()
    assert compat.target_of(thread) is None
