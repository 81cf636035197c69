import re
import shlex
import shutil

import pytest
import torch
from contract.cases import CASES
from hub.server import Fault, HubServer
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from hf_mm.cli import main
from hf_mm.hub import push
from hf_mm.hub.push import PushError, push_folder
from hf_mm.hub.standalone import standalone_changes

ID = "someone/tiny-vit"
CARD = '---\nlicense: mit\n---\n\n# tiny-vit\n\nA `tiny-vit` of {folder}.\n\n    pipeline("image-classification", model="tiny-vit")\n'
MODEL_FILES = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    case = next(case for case in CASES if case.name == "mm_vit classifier")
    folder = tmp_path_factory.mktemp("saved") / "tiny-vit"
    case.build().save_pretrained(folder)
    case.preparer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tiny-vit")


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as hub:
        hub.attach(monkeypatch)
        yield hub


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed_files(hub, ref="main"):
    return hub.state(ID)[ref][1]


class TestOneCommit:
    def test_everything_arrives_and_the_folder_stays(self, hub, folder):
        before = contents(folder)
        url = push_folder(folder, ID)
        assert contents(folder) == before
        commits = hub.repositories[ID].history()
        assert [commit.message for commit in commits] == ["Push tiny-vit", "initial commit"]
        assert url == f"{hub.url}/{ID}/commit/{commits[0].oid}"
        files = pushed_files(hub)
        changes = standalone_changes(folder)
        assert set(files) == {".gitattributes", *MODEL_FILES, *changes}
        assert {name: files[name].decode() for name in changes} == changes
        assert files["model.safetensors"] == before["model.safetensors"]
        assert ("PUT", "/lfs/") in {(method, path[:5]) for method, path in hub.requests}

    def test_without_code_the_files_are_the_folder(self, hub, folder):
        push_folder(folder, ID, standalone=False)
        files = pushed_files(hub)
        assert set(files) == {".gitattributes", *MODEL_FILES}
        assert {files[name] for name in MODEL_FILES - {"README.md"}} <= set(contents(folder).values())

    def test_the_shim(self, hub, folder):
        push_folder(folder, ID, shim=True)
        assert {name for name in pushed_files(hub) if name.endswith(".py")} == {"hf_mm_shim.py"}

    def test_the_card_names_the_repository_where_it_named_the_folder(self, hub, folder):
        push_folder(folder, ID)
        card = ModelCard(pushed_files(hub)["README.md"].decode())
        assert f"# {ID}\n" in card.text and f'model="{ID}"' in card.text
        assert "A `tiny-vit` of {folder}." in card.text  # no other word changes

    def test_a_card_of_another_name_is_not_touched(self, hub, folder):
        (folder / "README.md").write_text(CARD.replace("# tiny-vit", "# Ours"))
        push_folder(folder, ID)
        assert pushed_files(hub)["README.md"] == (folder / "README.md").read_bytes()

    def test_hidden_files_and_checkpoints_stay_at_home(self, hub, folder):
        for name in (".cache/x.json", "checkpoint-20/optimizer.pt", "__pycache__/a.pyc", ".README.md.tmp"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"x")
        push_folder(folder, ID, standalone=False)
        assert set(pushed_files(hub)) == {".gitattributes", *MODEL_FILES}

    def test_shards_and_subfolders_arrive(self, hub, folder):
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'
        )
        (folder / "figures").mkdir()
        (folder / "figures/loss.svg").write_text("<svg/>")
        push_folder(folder, ID)
        assert pushed_files(hub)["model-00001-of-00001.safetensors"] == weights
        assert pushed_files(hub)["figures/loss.svg"] == b"<svg/>"

    def test_what_a_repository_held_stays_and_its_history_too(self, hub, folder):
        repository = hub.make(ID)
        repository.commit("main", "notes", {"notes.txt": b"old", "config.json": b"{}"})
        push_folder(folder, ID, commit_message="Ours")
        files = pushed_files(hub)
        assert files["notes.txt"] == b"old" and files["config.json"] != b"{}"
        assert [commit.message for commit in repository.history()] == ["Ours", "notes", "initial commit"]

    def test_pushing_the_same_again_makes_no_commit(self, hub, folder):
        push_folder(folder, ID)
        before = hub.state(ID)
        assert push_folder(folder, ID).endswith(before["main"][0])
        assert hub.state(ID) == before

    def test_private(self, hub, folder):
        push_folder(folder, ID, private=True)
        assert hub.repositories[ID].private

    def test_another_branch(self, hub, folder):
        repository = hub.make(ID)
        repository.refs["dev"] = head = repository.refs["main"]
        push_folder(folder, ID, revision="dev")
        assert repository.refs["main"] == head
        assert set(pushed_files(hub, "dev")) > MODEL_FILES

    def test_a_pull_request(self, hub, folder):
        hub.make(ID)
        main_before = hub.state(ID)["main"]
        assert push_folder(folder, ID, create_pr=True) == f"{hub.url}/{ID}/discussions/1"
        assert hub.state(ID)["main"] == main_before
        assert set(pushed_files(hub, "refs/pr/1")) > MODEL_FILES


def rewrite(name, content):
    return lambda folder: (folder / name).write_text(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def lose_a_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = '"model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"'
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": {names}}}}}')


def pickle_beside(name):
    return lambda folder: torch.save({}, folder / name)


def link_outside(folder):
    elsewhere = folder.parent / "elsewhere.txt"
    elsewhere.write_text("private")
    (folder / "notes.txt").symlink_to(elsewhere)


def name_a_path(folder):
    (folder / "recipe.json").write_text(f'{{"data": {{"source": "{folder.parent}"}}}}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "holds no config.json"),
        (remove("config.json"), "holds no config.json"),
        (rewrite("config.json", "{"), "config.json cannot be read"),
        (rewrite("config.json", '{"model_type": "bert"}'), "'bert' is no model type of hf_mm"),
        (rewrite("preprocessor_config.json", "{"), "preprocessor_config.json.*JSON"),
        (remove("model.safetensors"), "lacks weights: model.safetensors"),
        (cut_weights, "model.safetensors is cut short"),
        (lose_a_shard, "lacks weights: model-00002-of-00002.safetensors"),
        (remove("README.md"), "has no card.*hf-mm card"),
        (rewrite("README.md", "---\na: [\n---\n"), "README.md cannot be read"),
        (pickle_beside("pytorch_model.bin"), r"pickles.*\(pytorch_model.bin\)"),
        (pickle_beside("training_args.bin"), r"pickles.*\(training_args.bin\)"),
        (rewrite("model.tmp", ""), r"temporary files.*\(model.tmp\)"),
        (rewrite("trainer_state.json", "{}"), r"state of a training.*\(trainer_state.json\)"),
        (lambda folder: save_file({}, folder / "optimizer.safetensors"), "state of a training"),
        (link_outside, r"links to files elsewhere.*\(notes.txt\)"),
        (rewrite("notes.md", f"token: hf_{'aB3' * 12}"), "notes.md holds an access token"),
        (rewrite("notes.md", "the word hub-token"), "notes.md holds an access token"),
        (name_a_path, "recipe.json holds a path of this machine"),
    ],
)
def test_a_folder_that_is_not_fit_is_refused_before_anything_is_sent(hub, folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        push_folder(folder, ID)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["a/b/c", "someone/a model", "someone/..", "-x/y", "model", ""])
def test_an_id_that_is_none_is_refused(hub, folder, name):
    with pytest.raises(ValueError, match="is no id of a repository"):
        push_folder(folder, name)
    assert hub.requests == []


def test_a_public_repository_is_not_taken_for_a_private_one(hub, folder):
    hub.make(ID)
    before = hub.state(ID)
    with pytest.raises(ValueError, match="exists and is public"):
        push_folder(folder, ID, private=True)
    assert hub.state(ID) == before


@pytest.mark.parametrize("exists", [True, False])
def test_a_branch_that_does_not_exist_is_refused(hub, folder, exists):
    if exists:
        hub.make(ID)
    before = hub.state(ID)
    with pytest.raises(ValueError, match="no branch 'dev'"):
        push_folder(folder, ID, revision="dev")
    assert hub.state(ID) == before


def command_of(error):
    """What the message says to run."""
    (command,) = re.findall("`([^`]+)`", str(error).replace("`hf auth login`", ""))
    words = shlex.split(command)
    assert words[0] == "hf-mm" and "\n" not in str(error)
    return words[1:]


@pytest.mark.parametrize("exists", [True, False])
def test_a_refused_token(hub, folder, exists, monkeypatch):
    if exists:
        hub.make(ID)
    before, files = hub.state(ID), contents(folder)
    monkeypatch.setenv("HF_TOKEN", "a-stranger")
    with pytest.raises(PushError, match="refused the token") as caught:
        push_folder(folder, ID)
    assert "a-stranger" not in str(caught.value)
    assert hub.state(ID) == before and contents(folder) == files
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert main(command_of(caught.value)) == 0
    assert set(pushed_files(hub)) > MODEL_FILES


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"private": True, "commit_message": "it's done", "shim": True},
        {"standalone": False, "revision": "main", "create_pr": True},
    ],
)
def test_the_command_has_every_option(hub, folder, options, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-stranger")
    with pytest.raises(PushError) as caught:
        push_folder(folder, ID, **options)
    received = {}
    monkeypatch.setattr(push, "push_folder", lambda *names, **options: received.update(options, names=names))
    assert main(command_of(caught.value)) == 0
    expected = {"private": False, "revision": None, "commit_message": None, "create_pr": False}
    assert received == {**expected, "standalone": True, "shim": False, **options, "names": (folder, ID)}


def test_a_commit_of_another_in_the_meantime_is_not_overwritten(hub, folder):
    """The head is read first and named in the commit: between the two, someone else commits."""
    repository = hub.make(ID)

    def someone_commits(method, path):
        if "/preupload/" in path:
            repository.commit("main", "someone else's", {"config.json": b"theirs"})

    hub.before = someone_commits
    with pytest.raises(PushError, match="someone committed to it since.*nothing of it is in") as caught:
        push_folder(folder, ID)
    assert pushed_files(hub) == {"config.json": b"theirs"}
    hub.before = lambda method, path: None
    assert main(command_of(caught.value)) == 0
    assert [commit.message for commit in repository.history()][:2] == ["Push tiny-vit", "someone else's"]


def test_a_repository_that_another_makes_at_the_same_time_is_left_alone(hub, folder):
    def someone_makes_it(method, path):
        if path.endswith("/repos/create"):
            hub.make(ID).commit("main", "someone else's", {"config.json": b"theirs"})

    hub.before = someone_makes_it
    with pytest.raises(PushError, match="someone made that repository at the same time"):
        push_folder(folder, ID)
    assert pushed_files(hub) == {"config.json": b"theirs"}


def test_an_interrupted_push_leaves_no_repository(hub, folder, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.lfs._upload_single_part", interrupted)
    with pytest.raises(PushError, match="interrupted.*removed again"):
        push_folder(folder, ID)
    assert hub.state(ID) is None


def requests_of_a_push(exists):
    """A push to a repository that exists: look, check the card, plan, LFS batch, PUT, verify, commit."""
    return 7 if exists else 9  # look, make, look


FAULTS = [
    pytest.param(
        exists, Fault(at, kind, lasting), id=f"{'old' if exists else 'new'}-{at}-{kind}{'-on' if lasting else ''}"
    )
    for exists in (True, False)
    for at in range(requests_of_a_push(exists))
    for kind, lasting in (("before", False), ("middle", False), ("after", False), ("500", False), ("before", True))
]


@pytest.mark.parametrize("exists", [True, False])
def test_the_faults_meet_every_request(hub, folder, exists):
    if exists:
        hub.make(ID)
    push_folder(folder, ID)
    assert len(hub.requests) == requests_of_a_push(exists)
    assert "/commit/" in hub.requests[-1][1]


@pytest.fixture(scope="module")
def generated(saved):
    """What a push adds, made once for all faults."""
    return standalone_changes(saved)


@pytest.mark.parametrize(("exists", "fault"), FAULTS)
def test_a_fault_leaves_the_repository_as_it_was_or_the_push_whole(hub, folder, generated, exists, fault, monkeypatch):
    """And the folder as it was; and the same command, run again, brings one commit with everything."""
    monkeypatch.setattr(push, "standalone_changes", lambda folder, shim: generated)
    if exists:
        hub.make(ID).commit("main", "notes", {"notes.txt": b"old"})
    before, files = hub.state(ID), contents(folder)
    earlier = [commit.oid for commit in hub.repositories[ID].history()] if exists else None
    hub.fault = fault
    try:
        push_folder(folder, ID)
        error = None
    except PushError as caught:
        error = caught
    hub.fault = None
    assert contents(folder) == files
    after = hub.state(ID)
    arrived = after is not None and set(after["main"][1]) >= MODEL_FILES
    if error is None:
        assert arrived
    elif arrived:  # the answer to the commit was lost
        assert "commit" in hub.requests[fault.at][1]
        assert f"{hub.url}/{ID}/commits/main" in str(error)
    elif exists:
        assert after == before
        said = ("nothing was sent", "nothing of it is in the repository", f"look first at {hub.url}/{ID}/commits/main")
        assert any(part in str(error) for part in said)
    else:
        assert after is None or set(after["main"][1]) == {".gitattributes"}
        if after is not None:  # it could not be asked to go
            assert f"{hub.url}/{ID}" in str(error)
            assert fault.lasting or hub.requests[fault.at][1].endswith("/create")

    if error is not None:
        assert main(command_of(error)) == 0
    commits = hub.repositories[ID].history()
    earlier = earlier or [commits[-1].oid]
    assert len(commits) == len(earlier) + 1 and [commit.oid for commit in commits[1:]] == earlier
    assert set(commits[0].files) == {*commits[1].files, *MODEL_FILES, *generated}
    assert commits[0].files["model.safetensors"] == files["model.safetensors"]
