import json
import resource
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from config_files import MANDATORY, compose_config, refusal
from recordings import hidden_score, make_recorded_group, make_scored, record, sampled_score, support_score

from opd_ray.protocol import RECORDED_VERSION, Score
from opd_ray.scores.files import DamagedRecording, ShardReader, prepare_folder, read_recording, write_update
from opd_ray.scores.manifest import from_json, to_json
from opd_ray.scores.messages import group_key
from workers.scores.recorder import Recorder

CONFIG = compose_config(*MANDATORY)
ONE, TWO, THREE = (make_scored(make_recorded_group(*prompt)) for prompt in ([1, 2], [2], [3, 3, 3]))


@pytest.mark.parametrize("score", [sampled_score(3), support_score(3), hidden_score(3)], ids=lambda s: type(s).__name__)
def test_what_is_recorded_is_read_bit_for_bit_and_marked_as_an_earlier_policys(tmp_path: Path, score: Score):
    written = make_scored(make_recorded_group(1, 2), score)
    recording = record(tmp_path, CONFIG, [[TWO, written]])
    reader = ShardReader(tmp_path)
    summary, group = reader.group(recording.groups[1])
    assert summary == replace(written.group_summary, oldest_version=RECORDED_VERSION)
    assert set(group.token_versions) == {RECORDED_VERSION}
    assert group_key(group) == group_key(written.group)
    of_score, read = reader.score(recording.groups[1])
    assert repr(of_score) == repr(written.score_summary)  # NaN is not equal to itself
    for message, original in (
        (replace(group, token_versions=written.group.token_versions), written.group),
        (read, score),
    ):
        assert type(message) is type(original)
        for field in fields(original):
            np.testing.assert_array_equal(getattr(message, field.name), getattr(original, field.name))
            assert type(getattr(message, field.name)) is type(getattr(original, field.name))
            if isinstance(getattr(original, field.name), np.ndarray):
                assert getattr(message, field.name).dtype == getattr(original, field.name).dtype


def test_the_index_names_every_group_in_the_order_of_updates(tmp_path: Path):
    recording = record(tmp_path, CONFIG, [[TWO, ONE], [THREE]])
    assert [(g.step, g.row, g.prompt_index) for g in recording.groups] == [(0, 0, 2), (0, 1, 1), (1, 0, 3)]
    assert recording.groups[2].num_prompt_tokens == 3
    assert recording.groups[0].response_lengths == (2, 1)
    assert recording.manifest.asked.payload.value == "support"
    assert from_json(to_json(recording.manifest)) == recording.manifest
    assert not list(tmp_path.glob("*.partial"))


def test_the_key_of_a_group_tells_it_from_others_but_not_from_itself_at_another_version():
    group = make_recorded_group(1, 2, responses=[[5, 6], [7]])
    assert group_key(group) == group_key(replace(group, token_versions=group.token_versions + 1))
    others = [
        make_recorded_group(1, 2, responses=[[5], [6, 7]]),  # other bounds of the same tokens
        make_recorded_group(1, 3, responses=[[5, 6], [7]]),
        replace(group, sampled_logprobs=group.sampled_logprobs - 1),
        replace(group, support_ids=np.zeros((3, 1), dtype=np.int32)),
        replace(group, task="copy"),
    ]
    assert len({group_key(g) for g in (group, *others)}) == 6


def test_a_large_update_is_cut_into_shards(tmp_path: Path):
    record(tmp_path, CONFIG, [])
    write_update(tmp_path, step=0, scored=[ONE, TWO, THREE], max_shard_bytes=ONE.num_bytes + TWO.num_bytes)
    recording = read_recording(tmp_path)
    assert [shard.file for shard in recording.shards] == [
        "update-000000-00.safetensors",
        "update-000000-01.safetensors",
    ]
    reader = ShardReader(tmp_path)
    assert [reader.group(g)[1].prompt_index for g in recording.groups] == [1, 2, 3]


def test_a_resumed_run_drops_what_was_recorded_after_its_checkpoint(tmp_path: Path):
    record(tmp_path, CONFIG, [[ONE], [TWO], [THREE]])
    recording = record(tmp_path, CONFIG, [[THREE]], step=1)
    assert [(g.step, g.prompt_index) for g in recording.groups] == [(0, 1), (1, 3)]
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    words = refusal(lambda: record(tmp_path, CONFIG, [], step=1, temperature=0.5))
    assert "was recorded under other settings" in words


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path):
    record(tmp_path, CONFIG, [[ONE], [TWO]])
    index = tmp_path / "index.jsonl"
    index.write_text(index.read_text()[:-20])
    assert [g.prompt_index for g in read_recording(tmp_path).groups] == [1]


def test_a_folder_without_a_recording_is_refused(tmp_path: Path):
    assert f"teacher.cache.path={tmp_path}/none: no such folder" in refusal(lambda: read_recording(tmp_path / "none"))
    assert "holds no manifest.json" in refusal(lambda: read_recording(tmp_path))
    record(tmp_path, CONFIG, [[ONE]])
    manifest, index = tmp_path / "manifest.json", tmp_path / "index.jsonl"
    written = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**written, "format": 99}))
    assert "manifest.json has format 99, this version reads format 1" in refusal(lambda: read_recording(tmp_path))
    manifest.write_text(json.dumps({"format": 1}))
    assert "manifest.json is not the manifest of a recording" in refusal(lambda: read_recording(tmp_path))
    manifest.write_text("{")
    assert "manifest.json is not the manifest of a recording" in refusal(lambda: read_recording(tmp_path))
    manifest.write_text(json.dumps(written))
    index.write_text("{}\n")
    assert "index.jsonl is damaged" in refusal(lambda: read_recording(tmp_path))
    index.unlink()
    assert "holds no index.jsonl" in refusal(lambda: read_recording(tmp_path))


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def test_a_damaged_shard_is_found_before_the_start_and_when_it_is_read(tmp_path: Path):
    recording = record(tmp_path, CONFIG, [[ONE], [TWO]])
    recording.verify(checksums=True)
    shard = tmp_path / recording.shards[1].file
    flip_last_byte(shard)
    recording.verify(checksums=False)
    assert f"the shard {shard.name} is damaged, it has changed" in refusal(lambda: recording.verify(checksums=True))
    reader = ShardReader(tmp_path)
    reader.group(recording.groups[0])
    reader.score(recording.groups[1])  # is whole
    with pytest.raises(DamagedRecording, match=r"update-000001-00.safetensors, row 0: its checksum differs"):
        reader.group(recording.groups[1])

    shard.write_bytes(shard.read_bytes()[:-10])
    assert "is damaged, it has" in refusal(lambda: recording.verify(checksums=False))
    with pytest.raises(DamagedRecording, match="cannot be read"):
        ShardReader(tmp_path).score(recording.groups[1])
    shard.unlink()
    assert f"the shard {shard.name} is missing" in refusal(lambda: recording.verify(checksums=False))
    with pytest.raises(DamagedRecording, match="cannot be read"):
        ShardReader(tmp_path).group(recording.groups[1])


def test_no_byte_of_a_row_can_change_unseen(tmp_path: Path):
    recording = record(tmp_path, CONFIG, [[ONE]])
    shard = tmp_path / recording.shards[0].file
    content = shard.read_bytes()
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    for position in range(header_bytes, len(content)):
        shard.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        reader, found = ShardReader(tmp_path), 0
        for read in (reader.group, reader.score):
            try:
                read(recording.groups[0])
            except DamagedRecording:
                found += 1
        assert found == 1, position


def test_a_disk_that_takes_no_more_leaves_a_whole_recording_up_to_there(tmp_path: Path):
    record(tmp_path, CONFIG, [])
    recorder = Recorder(folder=tmp_path)

    def write(step: int) -> str:
        return recorder.write(step, ["teacher"], ONE.group_summary, ONE.group, ONE.score_summary, ONE.score)

    assert write(0) == ""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the kernel then cuts a write short, as a full disk does
    try:
        fault = write(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert fault.startswith("update 1: ")
    assert "File too large" in fault
    assert write(2) == fault  # no update is missing in between
    recording = read_recording(tmp_path)
    recording.verify(checksums=True)
    assert [group.step for group in recording.groups] == [0]
    assert not list(tmp_path.glob("*.partial"))


def test_a_folder_that_cannot_be_made_is_refused_before_the_start(tmp_path: Path):
    (tmp_path / "file").write_text("")
    manifest = record(tmp_path / "other", CONFIG, []).manifest
    words = refusal(lambda: prepare_folder(tmp_path / "file" / "scores", manifest, step=0))
    assert words.startswith("record_scores=true: ")
    write_update(tmp_path / "other", step=0, scored=[ONE])
