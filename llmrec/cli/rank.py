"""The command `llmrec rank`."""

from __future__ import annotations

import typer

from llmrec import terminal
from llmrec.answer.rank.options import RankOptions, check_cluster_options
from llmrec.cli.console import format_number, show_shard, show_values
from llmrec.cli.options import check_exclusive_options
from llmrec.registry import extension_hook


def rank(options: RankOptions) -> None:
    """Rank items for a file of requests, or for every user.

    Ranks the candidates of each request or the whole catalogue, with a language model or a baseline. An interrupted run
    resumes. Exit code 0: all requests ranked; 1: some failed, with the reason in the output; 2: nothing was done.

    Example:
        llmrec rank --model runs/quickstart --all-users --to lists.csv --top 10
        llmrec rank --model runs/quickstart --in requests.jsonl --out lists.jsonl
    """
    from llmrec.answer.rank.run import STDOUT, console_rows, rank_file
    from llmrec.answer.rank.sharded import rank_shard
    from llmrec.answer.rank.users import rank_users
    from llmrec.records import Shard

    check_exclusive_options(options.shard, options.ray)
    check_cluster_options(options)
    if options.ray is not None and not options.all_users:
        extension_hook("rank-on-ray")(options, options.ray)
        return
    if options.all_users:
        summary = rank_users(options)
        show_values("lists", summary, format_number)
    elif options.shard is not None:
        summary = show_shard(rank_shard(options, Shard.parse(options.shard)), options.target)
    else:
        summary = rank_file(options)
        file = terminal.err() if options.target == STDOUT else None
        show_values("ranking", console_rows(summary), record={"ranking": summary}, file=file)
    raise typer.Exit(int(summary["failed"] != 0))
