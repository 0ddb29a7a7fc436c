"""`posttrain registry …`: what is registered, how it came to be, and which version an alias means."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.json_output import AsJson, echo_json
from posttrain.cli.registry_folder import DEFAULT, Folder, Ref, entry_line, open_registry
from posttrain.cli.registry_history import compare_versions, show_looks, show_tree, show_trend
from posttrain.errors import EXIT_AGAIN, RegistryError

if TYPE_CHECKING:
    from posttrain.evidence import RegistryEntry
    from posttrain.registry import Event, Registry

app = typer.Typer(name="registry", help="Versions, lineage and promotion.", no_args_is_help=True)

Alias = Annotated[str, typer.Option(help="Alias to move.")]
Url = Annotated[str, typer.Argument(metavar="URL", help="A folder, or a URL of fsspec: s3://BUCKET/PATH.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]

app.command("tree")(show_tree)
app.command("trend")(show_trend)
app.command("compare")(compare_versions)
app.command("looks")(show_looks)


@app.command("list")
def list_(
    name: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    registry: Folder = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """One line per version."""
    with open_registry(registry, for_reading=True) as book:
        entries = book.entries(name)
        if as_json:
            echo_json([version_record(entry) for entry in entries])
            return
        for entry in entries:
            typer.echo(entry_line(entry))


@app.command()
def show(
    ref: Ref,
    registry: Folder = DEFAULT,
    card: Annotated[bool, typer.Option("--card", help="Print the model card.")] = False,
    as_json: AsJson = False,
) -> None:
    """A version: its folder, its lineage and what happened to it."""
    with open_registry(registry, for_reading=True) as book:
        entry = book.find(ref)
        if card:
            from posttrain.registry.card import model_card

            typer.echo(model_card(book, entry.name, entry.version))
            return
        if as_json:
            echo_json(version_history(book, entry))
            return
        typer.echo(f"{entry_line(entry)}\n  path  {entry.path}")
        if (adapter := book.adapter(entry.name, entry.version)) is not None:
            base = book.chain(entry.name, entry.version)[0].inputs["model"]
            typer.echo(f"  adapter_total  {adapter}  (PEFT loads it onto the base {base})")
        for manifest in book.chain(entry.name, entry.version):
            typer.echo(f"  {manifest.stage}  {manifest.digest}")
            for what, digest in sorted(manifest.inputs.items()):
                typer.echo(f"    {what}  {digest}")
        verdict = book.verdict_record(entry.name, entry.version)
        if verdict is not None:
            typer.echo(f"  gate  {verdict['verdict']}: {verdict['reason']}")
        for event in book.rows.events(entry.name, version=entry.version):
            typer.echo(f"  {event.at}  {event.action} by {event.actor}: {_details(event)}")


@app.command()
def verify(ref: Ref, registry: Folder = DEFAULT, as_json: AsJson = False) -> None:
    """Walk the manifests and check every stored byte, offline."""
    with open_registry(registry, for_reading=True) as book:
        entry = book.find(ref)
        done = book.verify(entry.name, entry.version)
        if as_json:
            echo_json(asdict(done))
            return
        typer.echo(
            f"{entry.name}@{entry.version}: {done.num_files} files and {done.num_manifests} manifests are intact"
        )


@app.command()
def promote(
    ref: Ref,
    alias: Alias = "champion",
    verdict: Annotated[
        Path | None, typer.Option(help="Folder of `posttrain gate --out`; else the registered one.")
    ] = None,
    expected_epoch: Annotated[int | None, typer.Option(help="Refuse if the alias has moved since.")] = None,
    registry: Folder = DEFAULT,
) -> None:
    """Give an alias to a version that passed its gate against the present holder."""
    from posttrain.gate import recompute, verdict_from_json

    with open_registry(registry) as book:
        entry = book.find(ref)
        stored = book.verdict_record(entry.name, entry.version)
        if verdict is None and stored is None:
            raise RegistryError(
                f"{entry.name}@{entry.version} was registered without a verdict: name one with --verdict"
            )
        judged = recompute(verdict) if verdict is not None else verdict_from_json(stored or {})
        said = book.chain(entry.name, entry.version)[-1].decisions
        about = [decision for decision in said if decision.verdict_digest == judged.digest]
        done = book.promote(entry.name, entry.version, alias, judged, expected_epoch, decisions=about)
        typer.echo(entry_line(done))


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    reason: Annotated[str, typer.Option(help="Why; it becomes the hold on the version taken down.")],
    alias: Alias = "champion",
    registry: Folder = DEFAULT,
) -> None:
    """Give the alias back to its previous holder, and put the present one on hold."""
    with open_registry(registry) as book:
        typer.echo(entry_line(book.rollback(name, alias, reason)))


@app.command()
def hold(ref: Ref, reason: Annotated[str, typer.Option(help="Why.")], registry: Folder = DEFAULT) -> None:
    """Keep a version from being promoted."""
    with open_registry(registry) as book:
        entry = book.find(ref)
        book.tag(entry.name, entry.version, "hold", reason)
        typer.echo(entry_line(book.show(entry.name, entry.version)))


@app.command()
def release(ref: Ref, registry: Folder = DEFAULT) -> None:
    """Take the hold off a version."""
    with open_registry(registry) as book:
        entry = book.find(ref)
        book.untag(entry.name, entry.version, "hold")
        typer.echo(entry_line(book.show(entry.name, entry.version)))


@app.command()
def log(
    name: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    since: Annotated[str, typer.Option(metavar="DATE", help="From this day or moment on: 2026-01-31.")] = "",
    until: Annotated[str, typer.Option(metavar="DATE", help="To this day or moment, itself included.")] = "",
    by: Annotated[str, typer.Option(help="Only what this actor did.")] = "",
    kind: Annotated[str, typer.Option(help="Only these acts: register, promote, rollback, tag, look, remove …")] = "",
    head: Annotated[str, typer.Option(metavar="SEAL", help="A seal noted earlier that must still be in the log.")] = "",
    registry: Folder = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """What was done, when and by whom. The whole log is checked each time; exit code 64 if it is not as it was written."""
    from posttrain.registry.audit import LogFilter

    with open_registry(registry, for_reading=True) as book:
        asked = LogFilter(name or "", actor=by, action=kind, since=_moment(since), until=_moment(until))
        events = book.rows.log(asked)
        if as_json:
            echo_json([asdict(event) for event in events])
        for event in () if as_json else events:
            about = f"{event.name}@{event.version}" if event.name else "suites"
            typer.echo(f"{event.at}  {event.actor}  {event.action} {about}: {_details(event)}")
        done = book.rows.check_log(head)
        typer.echo(f"{len(events)} of {done.num_entries} entries; the last seal is {done.head}", err=True)


@app.command()
def remove(
    refs: Annotated[list[str], typer.Argument(metavar="REF...", help="NAME@VERSION; may be repeated.")],
    reason: Annotated[str, typer.Option(help="Why; it stays in the log.")],
    dry_run: DryRun = False,
    registry: Folder = DEFAULT,
) -> None:
    """Take versions out. Refused while an alias, another version's lineage, a running pipeline or a reproduction needs one."""
    from posttrain.registry import upkeep

    with open_registry(registry) as book:
        for ref in refs:
            found = book.find(ref)
            entry = upkeep.remove_version(book, found.name, found.version, reason, dry_run=dry_run)
            typer.echo(f"{entry.name}@{entry.version} {'would be removed' if dry_run else 'is removed'}")
    typer.echo("its files stay until `posttrain registry gc`")


@app.command()
def gc(dry_run: DryRun = False, registry: Folder = DEFAULT, as_json: AsJson = False) -> None:
    """Delete the files that no version needs."""
    from posttrain.files import size_text
    from posttrain.registry import upkeep

    with open_registry(registry) as book:
        done = upkeep.collect(book, dry_run=dry_run)
    if as_json:
        echo_json(asdict(done))
        return
    for said in done.read:
        typer.echo(f"kept: {said}")
    for folder in done.folders:
        typer.echo(f"{'would delete' if dry_run else 'deleted'} {folder}/")
    word = "would be deleted" if dry_run else "deleted"
    typer.echo(
        f"{done.num_deleted} objects ({size_text(done.deleted_bytes)}) {word}; {done.num_kept} ({size_text(done.kept_bytes)}) "
        "kept: versions name them"
    )


@app.command()
def push(
    ref: Ref,
    url: Annotated[str, typer.Argument(metavar="[URL]", help="A folder, or a URL of fsspec: s3://BUCKET/PATH.")] = "",
    alias: Annotated[str, typer.Option(help="Move this alias there too; the version must hold it here.")] = "",
    push_to_hub: Annotated[
        str,
        typer.Option(metavar="OWNER/NAME", help="Instead of a URL: a repository of the Hugging Face hub (HF_TOKEN)."),
    ] = "",
    adapter: Annotated[
        bool, typer.Option("--adapter", help="To the hub: the adapter of the whole lineage, not the model.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="A repository that is made is private.")] = False,
    registry: Folder = DEFAULT,
) -> None:
    """Copy a version to another folder, object store or the hub, verified at both ends. Killed half-way, push again."""
    from posttrain.registry.remote import Remote, push_version

    if bool(url) == bool(push_to_hub) or (alias and push_to_hub) or (adapter and not push_to_hub):
        raise RegistryError("expected a URL (with --alias), or --push-to-hub OWNER/NAME (with --adapter, --private)")
    with open_registry(registry, for_reading=True) as book:
        entry = book.find(ref)
        if push_to_hub:
            from posttrain.pipeline import hub_push

            address = hub_push.push_to_hub(book, entry, push_to_hub, adapter=adapter, private=private or None)
            typer.echo(f"{entry.name}@{entry.version} is at {address}")
            return
        done = push_version(book, entry, Remote(url), alias)
    typer.echo(f"{done.ref} is at {url}: {done.num_copied} objects copied, {done.num_present} were there")


@app.command()
def pull(
    ref: Annotated[str, typer.Argument(metavar="REF", help="NAME@VERSION or NAME@ALIAS there.")],
    url: Url,
    registry: Folder = DEFAULT,
) -> None:
    """Copy a version from another folder or object store. It becomes the next version here; no alias moves."""
    from posttrain.registry import Registry
    from posttrain.registry.remote import Remote, pull_version

    remote, book = Remote(url), Registry(registry)
    try:
        _, done = pull_version(book, ref, remote)
    finally:
        book.close()
    typer.echo(f"{ref} of {url} is {done.ref}: {done.num_copied} objects copied, {done.num_present} were here")


@app.command()
def mirror(
    uri: Annotated[str, typer.Argument(help="An MLflow registry: a server's URL, or sqlite:///file.db.")],
    registry: Folder = DEFAULT,
) -> None:
    """Send to MLflow what has not been sent yet. Exit code 75 while events wait."""
    from posttrain.registry.mirror import MlflowMirror, deliver

    with open_registry(registry) as book:
        done = deliver(book, MlflowMirror(uri))
    for event in done.passed_over:
        typer.echo(f"passed over, MLflow will never take it: {event}", err=True)
    typer.echo(f"{done.sent} events sent" + (f"; {done.pending} wait: {done.error}" if done.pending else ""))
    if done.pending:
        raise typer.Exit(EXIT_AGAIN)


def _moment(text: str) -> str:
    """A date, or a moment in UTC. Raises: RegistryError for what is neither."""
    from datetime import datetime

    try:
        datetime.fromisoformat(text or "2000-01-01")
    except ValueError:
        raise RegistryError(f"got {text!r}, expected a date such as 2026-01-31, or 2026-01-31T12:00 in UTC") from None
    return text


def _details(event: Event) -> str:
    return ", ".join(f"{key} {value}" for key, value in event.details.items())


def version_record(entry: RegistryEntry) -> dict[str, Any]:
    """A version as JSON data, with the absolute folder to load it from."""
    fields = {"name": entry.name, "version": entry.version, "digest": entry.digest, "path": str(entry.path.resolve())}
    return fields | {"aliases": list(entry.aliases), "tags": dict(entry.tags)}


def version_history(book: Registry, entry: RegistryEntry) -> dict[str, Any]:
    """A version with its lineage, its verdict and what happened to it."""
    chain = [manifest.to_json() | {"digest": manifest.digest} for manifest in book.chain(entry.name, entry.version)]
    events = [asdict(event) for event in book.rows.events(entry.name, version=entry.version)]
    verdict = book.verdict_record(entry.name, entry.version)
    adapter = book.adapter(entry.name, entry.version)
    offered = {"adapter_total": None if adapter is None else str(adapter.resolve())}
    return version_record(entry) | offered | {"lineage": chain, "verdict": verdict, "events": events}
