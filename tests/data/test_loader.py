"""The loader: exact resumption, the same sequences for any number of processes, refusal of other data."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_jax.data.errors import DataError
from dsv3_jax.data.loader import Loader

TEXTS = [f"text {i}: " + "abcdefgh"[i % 8] * (5 + 3 * i) for i in range(20)]
FIELDS = {"tokens", "targets", "segment_ids", "positions", "loss_mask"}


@pytest.fixture
def load(make_config):
    def make(*, split="train", seq_len=16, seed=0, start=0, process=(0, 1), texts=TEXTS, **fields):
        config = make_config(texts, **fields)
        index, count = process
        return Loader(
            config,
            split=split,
            seq_len=seq_len,
            seed=seed,
            start=start,
            process_index=index,
            process_count=count,
        )

    return make


def _rows(batches):
    return np.concatenate([batch["tokens"] for batch in batches]).tolist()


@pytest.mark.parametrize("threads", [0, 2])
def test_batches_are_the_sequences_in_order(load, threads):
    loader = load(fim_rate=0.5, mask_documents=True, read_threads=threads)
    position = 0
    for n in (1, 4, 2, 300):  # The last is several epochs.
        batch = loader.take(n)
        assert set(batch) == FIELDS
        for name, values in batch.items():
            assert values.shape == (n, 16)
            expected = [loader.sequences[i][name] for i in range(position, position + n)]
            assert np.array_equal(values, expected)
        position += n
        assert loader.position == position
    loader.close()


def test_resuming_at_every_position(load):
    unbroken = load(fim_rate=0.3)
    rows = []
    states = [json.dumps(unbroken.get_state())]
    for _ in range(40):
        rows.append(unbroken.take(1)["tokens"][0].tolist())
        states.append(json.dumps(unbroken.get_state()))
    resumed = load(fim_rate=0.3)
    for position in range(40):
        resumed.set_state(json.loads(states[position]))
        assert resumed.position == position
        assert resumed.take(3)["tokens"].tolist()[: 40 - position] == rows[position : position + 3]
    assert load(fim_rate=0.3, start=17).take(5)["tokens"].tolist() == rows[17:22]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.integers(0, 100),
    steps=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    count=st.sampled_from([2, 4]),
)
def test_processes_share_the_same_sequences(load, start, steps, count):
    one = load(start=start)
    many = [load(start=start, process=(p, count)) for p in range(count)]
    for step in steps:
        n = 4 * step
        expected = one.take(n)["tokens"].tolist()
        first = one.position - n
        parts = [loader.take(n)["tokens"].tolist() for loader in many]
        for p, part in enumerate(parts):
            assert part == [row for i, row in enumerate(expected, first) if i % count == p]
        assert {loader.position for loader in many} == {one.position}
    for loader in (one, *many):
        loader.close()


def test_state_moves_between_numbers_of_processes(load):
    two = [load(process=(p, 2)) for p in range(2)]
    for loader in two:
        loader.take(6)
    assert two[0].get_state() == two[1].get_state()
    one, unbroken = load(), load(start=6)
    one.set_state(two[1].get_state())
    assert np.array_equal(one.take(4)["tokens"], unbroken.take(4)["tokens"])


def test_seed_decides_the_order(load):
    a, b, c = (_rows([load(seed=seed).take(8)]) for seed in (1, 1, 2))
    assert a == b != c


def test_validation_is_one_pass_again_and_again(load):
    loader = load(split="validation", fim_rate=1.0)
    n = loader.per_pass
    rows = _rows([loader.take(2 * n)])
    assert rows[:n] == rows[n:]
    assert _rows([load(split="validation", seed=9, fim_rate=1.0).take(n)]) == rows[:n]
    assert max(map(max, rows)) <= loader.tokenizer.eos_id  # No fill-in-the-middle.
    loader.seek(0)
    assert _rows([loader.take(n)]) == rows[:n]
    # Whole sequences of the held-out documents, and nothing of the training ones.
    train, held_out = load().sequences.stream.documents, loader.sequences.stream.documents
    assert not set(train.numbers) & set(held_out.numbers)
    stream, _ = loader.sequences.stream.read(0, n * 16)
    assert sorted(rows[:n]) == sorted(stream.reshape(n, 16).tolist())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"texts": [*TEXTS[:-1], "changed"]}, "data.source"),
        ({"validation_fraction": 0.4}, "data.validation_fraction"),
        ({"fim_rate": 0.1}, "data.fim_rate"),
        ({"seq_len": 8}, "train.seq_len"),
        ({"seed": 5}, "train.seed"),
    ],
)
def test_state_of_other_data_is_refused(load, change, field):
    loader = load()
    loader.take(3)
    state = loader.get_state()
    with pytest.raises(DataError, match=f"^{field} = .*the saved position is of other data, with ") as error:
        load(**change).set_state(state)
    assert error.value.field == field


def test_state_of_another_tokenizer_is_refused(load, save_tokenizer, tmp_path):
    state = load().get_state()
    path = save_tokenizer(tmp_path / "tokenizer.json", ["</s>"])
    with pytest.raises(DataError, match=r"^data\.(source|tokenizer) = "):
        load(tokenizer=path).set_state(state)


def test_state_of_the_other_split_is_refused(load):
    with pytest.raises(ValueError, match='of split "validation", this is "train"'):
        load().set_state(load(split="validation").get_state())


@pytest.mark.parametrize("split", ["train", "validation"])
def test_split_shorter_than_a_sequence_is_refused(load, split):
    with pytest.raises(
        DataError, match=rf"^data.source = .*its {split} split has \d+ tokens, .* needs 10001"
    ):
        load(split=split, seq_len=10000)


def test_fim_without_its_tokens_is_refused(load, save_tokenizer, tmp_path):
    path = save_tokenizer(tmp_path / "tokenizer.json", ["</s>"])
    with pytest.raises(DataError, match="^data.fim_rate = 0.5: the tokenizer has no FIM tokens"):
        load(tokenizer=path, fim_rate=0.5)


def test_bad_calls_are_refused(load):
    with pytest.raises(ValueError, match='split = "test"'):
        load(split="test")
    with pytest.raises(ValueError, match="process_index = 2 of process_count = 2"):
        load(process=(2, 2))
    for n in (0, -2, 3):
        with pytest.raises(ValueError, match=f"{n} sequences can't be shared by 2 processes"):
            load(process=(0, 2)).take(n)
    with pytest.raises(ValueError, match="position = -1"):
        load(start=-1)


def test_describe_names_the_documents_of_a_batch(load):
    assert ".txt" in load().describe(0, 4)
