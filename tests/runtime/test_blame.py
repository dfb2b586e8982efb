"""From what processes said to whom to blame; the processes themselves are in test_faults.py."""

import pytest

from deepfuse.runtime.blame import Beat, blame, ranks

WELL = Beat(count=9, step=3, phase="forward", seconds=2.5, place="a.py:1 in f")
LOST = Beat(count=9, step=3, phase="forward", end="lost", reason="RuntimeError: Connection closed by peer")
FAILED = Beat(count=9, step=3, phase="forward", end="failed", reason="ValueError: bad")
LEFT = Beat(count=9, step=3, end="left")


@pytest.mark.parametrize(
    ("beats", "silent", "lost", "blamed", "words"),
    [
        # silence says most: others are lost because of it
        (
            {0: LOST, 2: WELL},
            [2],
            False,
            (2,),
            "rank 2 is silent: its last beat was in step 3 (forward), at a.py:1 in f",
        ),
        ({0: FAILED, 2: WELL}, [2], False, (2,), "rank 2 is silent"),
        # who has said a last word has a right to be silent
        ({0: LOST, 2: FAILED}, [0, 2], False, (2,), "rank 2 failed after step 3 (forward): ValueError: bad"),
        ({0: LOST, 2: LEFT}, [0, 2], False, (2,), "rank 2 ended after step 3: its program did"),
        (
            {0: LOST, 2: WELL},
            [],
            False,
            (2,),
            "rank 2 lives, but has been in step 3 (forward) for 2.5 s, at a.py:1 in f",
        ),
        ({0: LOST, 2: LOST}, [], False, (), "all processes live: a connection between them is torn; rank 0: Runtime"),
        ({0: WELL, 2: WELL}, [], True, (0,), "rank 0, which hosts the store, cannot be reached"),
        # the host of the store ended in order, and took it along
        ({0: LOST, 2: WELL}, [2], True, (2,), "rank 2 is silent"),
    ],
)
def test_blame(beats, silent, lost, blamed, words):
    got = blame(beats, silent, 1, store_lost=lost, agent=False)
    assert got[0] == blamed and got[1].startswith(words)


def test_who_others_gave_up_is_told_so():
    beats = {r: Beat(count=1, end="lost", blamed=(1,)) for r in (0, 2, 3)}
    assert blame(beats, [], 1, store_lost=True, agent=False) == (
        (1,),
        "ranks 0, 2-3 gave up waiting for this one, rank 1",
    )


def test_an_agents_store_is_no_ranks():
    blamed, why = blame({0: WELL, 2: WELL}, [], 1, store_lost=True, agent=True)
    assert blamed == () and why.startswith("the store of torchrun's agent cannot be reached")


def test_beats_are_read_as_they_were_written():
    for beat in (WELL, Beat(count=1, step=None, end="lost", blamed=(0, 3))):
        assert Beat.read(beat.write().encode()) == beat


def test_ranks_are_listed_in_runs():
    assert ranks([3]) == "rank 3" and ranks([7, 0, 1, 2]) == "ranks 0-2, 7"
