import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from contract.cases import CASES
from hub.server import LARGE_SIZE, Fault, HubServer, Refused
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification

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

    @pytest.mark.parametrize(
        ("title", "is_its_name"),
        [("work/tiny-vit", True), ("../tiny-vit", True), ("ork/tiny-vit", False), ("work", False)],
    )
    def test_the_card_may_name_the_folder_by_a_path_from_elsewhere(self, hub, folder, tmp_path, title, is_its_name):
        work = shutil.copytree(folder, tmp_path / "work/tiny-vit")
        (work / "README.md").write_text(CARD.replace("tiny-vit", title))
        push_folder(work, ID)
        text = pushed_files(hub)["README.md"].decode()
        name = ID if is_its_name else title
        assert f"# {name}\n" in text and f'model="{name}"' in text

    def test_the_name_is_replaced_where_it_names_the_model_alone(self, hub, folder):
        told = 'label="tiny-vit"\n\n- name: tiny-vit\n\n# tiny-vit again\n'
        opened = "AutoModel.from_pretrained('tiny-vit')"
        (folder / "README.md").write_text(CARD + told + opened)
        push_folder(folder, ID)
        text = pushed_files(hub)["README.md"].decode()
        assert text.endswith(told + opened.replace("tiny-vit", ID))

    @pytest.mark.parametrize("key", ["model_name: ", "model-index:\n- name: "])
    def test_the_metadata_name_the_repository_too(self, hub, folder, key):
        results = "\n  results: []" if "index" in key else ""
        card = CARD.replace("license: mit", f"license: mit\n{key}tiny-vit{results}")
        (folder / "README.md").write_text(card + "model_name: tiny-vit\n")
        push_folder(folder, ID)
        text = pushed_files(hub)["README.md"].decode()
        assert f"\n{key}{ID}\n" in text and text.endswith("\nmodel_name: tiny-vit\n")

    def test_a_card_of_another_name_is_not_touched(self, hub, folder):
        (folder / "README.md").write_text(CARD.replace("# tiny-vit", "# Ours"))
        push_folder(folder, ID)
        assert pushed_files(hub)["README.md"] == (folder / "README.md").read_bytes()

    def test_hidden_files_and_checkpoints_stay_at_home(self, hub, folder):
        hidden = (".cache/x.json", ".README.md.tmp", "__pycache__/a.pyc")
        training = (
            "checkpoint-20/optimizer.pt",
            "training_args.bin",
            "wandb/x",
            "runs/Nov26_host/events.tfevents.host",
        )
        for name in (*hidden, *training):
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).write_bytes(b"x")
        push_folder(folder, ID, standalone=False)
        assert set(pushed_files(hub)) == {".gitattributes", *MODEL_FILES}

    def test_what_tells_of_the_pictures_it_saw_stays_at_home(self, hub, folder):
        """Cached features and the index of pictures; another folder or file of that name arrives."""
        features = ("features/0123456789ab/index.json", "features/0123456789ab/000000-0123abcd.json")
        index = ("index/index.json", "index/state.json", "index/data-00000-of-00001.arrow", "x/index/index.json")
        others = ("words/index/words.txt", "y/index", "figures/index.json")
        for name in (*features, *index, *others):
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).write_text('{"picture": "/data/secret/a.png"}' if name not in others else "{}")
        push_folder(folder, ID, standalone=False)
        assert set(pushed_files(hub)) == {".gitattributes", *MODEL_FILES, *others}

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

    def test_a_large_file_of_any_name_goes_by_lfs(self, hub, folder):
        (folder / "notes.txt").write_bytes(b"x" * (LARGE_SIZE + 1))
        push_folder(folder, ID)
        assert pushed_files(hub)["notes.txt"] == b"x" * (LARGE_SIZE + 1)
        assert len([path for method, path in hub.requests if method == "PUT"]) == 2

    @pytest.mark.parametrize("now_in_shards", [True, False])
    def test_weights_of_an_earlier_push_are_not_opened_in_place_of_these(self, hub, folder, tmp_path, now_in_shards):
        """One file and shards take turns: what is left of the other form would be opened first."""
        model = AutoModelForImageClassification.from_pretrained(folder)
        in_shards = shutil.copytree(folder, tmp_path / "in_shards")
        (in_shards / "model.safetensors").unlink()
        earlier, later = (folder, in_shards) if now_in_shards else (in_shards, folder)
        for place, value in ((earlier, 0.5), (later, 0.25)):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(value)
            model.save_pretrained(place, max_shard_size="20KB" if place == in_shards else "5GB")
            push_folder(place, ID)
        (tmp_path / "opened").mkdir()
        for name, data in pushed_files(hub).items():
            (tmp_path / "opened" / name).write_bytes(data)
        assert len(list(later.glob("*.safetensors"))) == len(list((tmp_path / "opened").glob("*.safetensors")))
        opened = AutoModelForImageClassification.from_pretrained(tmp_path / "opened")
        assert all((parameter == 0.25).all() for parameter in opened.parameters())

    def test_an_adapter_of_an_earlier_push_is_not_put_on_top(self, hub, folder):
        adapter = {
            "adapter_config.json": b"{}",
            "adapter_model.safetensors": b"x",
            "adapter/adapter_config.json": b"{}",
        }
        hub.make(ID).commit("main", "adapter", adapter)
        push_folder(folder, ID)
        assert {name for name in pushed_files(hub) if "adapter" in name} == {"adapter/adapter_config.json"}

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


class TestRecords:
    """A run's recipe and results are pushed, with the last part of every path of this machine."""

    def test_paths_are_cut_to_their_last_part(self, hub, folder):
        skipped = {"/data/secret/a.png": "cannot read '/data/secret/a.png'", "row 3": "see https://example.org/a/b"}
        recipe = {"source": "/data/secret/pictures/", "nested": {"names": ["C:\\secret\\x", "and/or", r"\d+\.conv"]}}
        (folder / "recipe.json").write_text(json.dumps(recipe))
        (folder / "results.json").write_text(json.dumps({"data": {"skipped": skipped}, "loss": 0.5}))
        push_folder(folder, ID)
        files = pushed_files(hub)
        expected = {"source": "pictures", "nested": {"names": ["x", "and/or", r"\d+\.conv"]}}
        assert json.loads(files["recipe.json"]) == expected
        skipped = {"a.png": "cannot read 'a.png'", "row 3": "see https://example.org/a/b"}
        assert json.loads(files["results.json"]) == {"data": {"skipped": skipped}, "loss": 0.5}
        assert json.loads((folder / "recipe.json").read_text()) == recipe

    @pytest.mark.parametrize(
        ("name", "pushed"),
        [("/data/secret/clip", "clip"), ("C:\\secret\\clip", "clip"), ("openai/clip", "openai/clip"), (None, None)],
    )
    @pytest.mark.parametrize("standalone", [True, False])
    def test_so_is_the_path_of_a_frozen_part(self, hub, folder, name, pushed, standalone):
        config = json.loads((folder / "config.json").read_text())
        config["base_models"] = {"clip": {"name": name, "revision": None}}
        written = json.dumps(config)
        (folder / "config.json").write_text(written)
        push_folder(folder, ID, standalone=standalone)
        found = json.loads(pushed_files(hub)["config.json"])
        assert found["base_models"] == {"clip": {"name": pushed, "revision": None}}
        assert ("auto_map" in found) == standalone and found["model_type"] == "mm_vit"
        assert (folder / "config.json").read_text() == written


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


A_TOKEN = f"hf_{'aB3' * 12}"
TEXTS = ("run.sh", "log.csv", "train.log", "nb.ipynb", "conf.toml", "NOTES", "x.svg", "notes.md")


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
        (pickle_beside("optimizer.pt"), r"pickles.*\(optimizer.pt\)"),
        (rewrite("model.tmp", ""), r"temporary files.*\(model.tmp\)"),
        (rewrite("trainer_state.json", "{}"), r"state of a training.*\(trainer_state.json\)"),
        (lambda folder: save_file({}, folder / "optimizer.safetensors"), "state of a training"),
        (lambda folder: save_file({}, folder / "rng_state_0.safetensors"), "state of a training"),
        (link_outside, r"links to files elsewhere.*\(notes.txt\)"),
        (rewrite("notes.md", "the word hub-token"), "notes.md holds an access token"),
        *((rewrite(name, f"token: {A_TOKEN}"), f"{name} holds an access token") for name in TEXTS),
        *((rewrite(name, f"cd {Path.home()}/secret"), f"{name} holds a path of this machine") for name in TEXTS),
        (rewrite("notes.md", f"file://{Path.home()}/secret"), "notes.md holds a path of this machine"),
        (rewrite("recipe.json", json.dumps({"token": A_TOKEN})), "recipe.json holds an access token"),
        (rewrite("more.json", '{"data": [{"source": "/nowhere/here"}]}'), "a path of this machine, '/nowhere/here'"),
        (rewrite("more.json", '{"source": "C:\\\\pictures"}'), "more.json holds a path of this machine"),
        (
            rewrite("README.md", "---\nlicense: mit\n---\n\n[More Information Needed]"),
            "says 'More Information Needed'",
        ),
        (rewrite("model.safetensors.index.json", "{}"), "index.json has no weight_map"),
        (rewrite("model.safetensors.index.json", "[1]"), "index.json has no weight_map"),
        (rewrite("model.safetensors.index.json", "{"), "index.json is not JSON"),
    ],
)
def test_a_folder_that_is_not_fit_is_refused_before_anything_is_sent(hub, folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        push_folder(folder, ID)
    assert hub.requests == []


def test_the_token_that_is_given_is_looked_for_too(hub, folder, monkeypatch):
    (folder / "notes.md").write_text("the word another-token")
    with pytest.raises(ValueError, match="notes.md holds an access token"):
        push_folder(folder, ID, token="another-token")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("scheduler.json", "{}"),
        ("optimizer.md", "AdamW"),
        ("embeddings.npy", b"\x93NUMPY\xff"),
        ("tokenizer.json", json.dumps({"vocab": ["/usr/local", "~/.x/y"]})),
        ("notes.md", "see https://example.org/root/x and www.example.org/root/x"),
        ("more.json", json.dumps(["a/b", "/", "/x", r"\d+\.conv", "https://example.org/a/b"])),
    ],
)
def test_what_is_harmless_is_pushed(hub, folder, name, content, monkeypatch):
    monkeypatch.setenv("HOME", "/root")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    push_folder(folder, ID)
    assert pushed_files(hub)[name] == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("license: MIT", '"license" must be one of'),
        ("license: mit\nbase_model: outputs/a/b", '"outputs/a/b" is no id'),
        ("license: mit\ndatasets: [my pictures]", '"my pictures" is no id'),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_a_card_that_the_hub_refuses_stops_the_push_before_anything_is_made(hub, folder, exists, metadata, message):
    if exists:
        hub.make(ID)
    before = hub.state(ID)
    (folder / "README.md").write_text(CARD.replace("license: mit", metadata))
    with pytest.raises(ValueError, match=f"does not take the metadata of README.md: .*{message}") as caught:
        push_folder(folder, ID)
    assert "\n" not in str(caught.value)
    assert hub.state(ID) == before and hub.objects == {}
    assert [path.split("/")[2] for _, path in hub.requests] == ["models", "validate-yaml"]


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


def on(fragment, act, times=1):
    """Does something before a request whose path has that part."""
    left = [act] * times

    def before(method, path):
        if fragment in f"{method} {path}" and left:
            left.pop()()

    return before


def refuse(*arguments):
    def act():
        raise Refused(*arguments)

    return act


def commit_theirs(hub):
    return lambda: hub.repositories[ID].commit("main", "someone else's", {"config.json": b"theirs"})


def test_a_new_repository_that_another_commits_to_is_not_removed(hub, folder):
    hub.before = on("/preupload/", commit_theirs(hub))
    with pytest.raises(PushError, match="someone committed.*now holds something else or cannot be seen, and is left"):
        push_folder(folder, ID)
    assert pushed_files(hub) == {"config.json": b"theirs"}


def test_nor_is_it_where_the_upload_fails_after_that(hub, folder):
    def commit_and_refuse():
        commit_theirs(hub)()
        raise Refused(403, "storage quota exceeded")

    hub.before = on("PUT /lfs/", commit_and_refuse)
    with pytest.raises(PushError, match="storage quota exceeded.*now holds something else") as caught:
        push_folder(folder, ID)
    assert f"{hub.url}/{ID}" in str(caught.value)
    assert pushed_files(hub) == {"config.json": b"theirs"}


def test_a_new_repository_that_cannot_be_seen_yet_gets_no_commit(hub, folder):
    """A commit without the one that it follows would overwrite whatever came between."""
    hide = on(f"GET /api/models/{ID}", refuse(404, "Repository not found", "RepoNotFound"))
    hub.before = on("/repos/create", lambda: setattr(hub, "before", hide))
    with pytest.raises(PushError, match="cannot be seen yet.*cannot be seen, and is left"):
        push_folder(folder, ID)
    assert set(pushed_files(hub)) == {".gitattributes"}
    assert not [path for _, path in hub.requests if "/commit/" in path or "/preupload/" in path]


def test_a_new_repository_that_is_unfit_is_removed_again(hub, folder, monkeypatch):
    """One that begins with a .gitignore."""
    make = hub.make

    def make_with_gitignore(name, private):
        repository = make(name, private)
        repository.commits[repository.refs["main"]].files[".gitignore"] = b"*.safetensors"

    monkeypatch.setattr(hub, "make", make_with_gitignore)
    with pytest.raises(PushError, match=r"\.gitignore.*removed again"):
        push_folder(folder, ID)
    assert hub.state(ID) is None


def test_files_that_a_gitignore_of_the_repository_names_are_not_left_out_in_silence(hub, folder):
    hub.make(ID).commit("main", "ignore", {".gitignore": b"*.safetensors"})
    before = hub.state(ID)
    with pytest.raises(ValueError, match=rf"\.gitignore of {ID} leaves out model\.safetensors"):
        push_folder(folder, ID)
    assert hub.state(ID) == before


@pytest.mark.parametrize(
    ("fragment", "refusal", "said"),
    [
        (
            "/commit/",
            (400, "files above 10 MiB"),
            r"the Hub answered 400: files above 10 MiB\): nothing of it is in the",
        ),
        ("/repos/create", (403, "not in that group"), r"403; .*: not in that group\): nothing was sent;"),
        ("/repos/create", (500, "broken"), r"500: broken\): if a repository was made all the same"),
    ],
)
def test_the_message_says_what_the_hub_says(hub, folder, fragment, refusal, said):
    if fragment == "/commit/":
        hub.make(ID)
    hub.before = on(fragment, refuse(*refusal), times=9)
    with pytest.raises(PushError, match=said):
        push_folder(folder, ID)


def test_that_there_is_no_token_is_said(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(PushError, match="there is no token, 401.*nothing was sent"):
        push_folder(folder, ID)
    with pytest.raises(PushError, match="refused the token, 401"):
        push_folder(folder, ID, token="a-stranger")


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
    """The kinds of requests of a push, in their order. The client asks about the card once more before it commits."""
    making = [] if exists else ["repos/create", f"models/{ID}"]
    upload = ["preupload", "info/lfs", "lfs", "verify"]
    return [f"models/{ID}", "validate-yaml", *making, *upload, "validate-yaml", "commit"]


FAULTS = [
    pytest.param(
        exists, Fault(at, kind, lasting), id=f"{'old' if exists else 'new'}-{at}-{kind}{'-on' if lasting else ''}"
    )
    for exists in (True, False)
    for at in range(len(requests_of_a_push(exists)))
    for kind, lasting in (("before", False), ("middle", False), ("after", False), ("500", False), ("before", True))
]


@pytest.mark.parametrize("exists", [True, False])
def test_the_faults_meet_every_request(hub, folder, exists):
    if exists:
        hub.make(ID)
    push_folder(folder, ID)
    expected = requests_of_a_push(exists)
    assert len(hub.requests) == len(expected)
    assert all(kind in path for kind, (_, path) in zip(expected, hub.requests, strict=True))


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
        if after is not None:  # it could not be asked to go, or might yet get the commit
            assert f"{hub.url}/{ID}" in str(error)
            at = requests_of_a_push(exists)
            may_stay = (at.index("repos/create"), at.index("repos/create") + 1, len(at) - 2, len(at) - 1)
            assert fault.lasting or fault.at in may_stay
    if error is not None and fault.at == len(requests_of_a_push(exists)) - 1:
        assert "nothing of it" not in str(error) and "removed" not in str(error)

    if error is not None:
        assert main(command_of(error)) == 0
    commits = hub.repositories[ID].history()
    earlier = earlier or [commits[-1].oid]
    assert len(commits) == len(earlier) + 1 and [commit.oid for commit in commits[1:]] == earlier
    assert set(commits[0].files) == {*commits[1].files, *MODEL_FILES, *generated}
    assert commits[0].files["model.safetensors"] == files["model.safetensors"]
