"""The command `llmrec rank`."""

from __future__ import annotations

import typer

from llmrec import terminal
from llmrec.answer.rank.options import RankOptions, check_cluster
from llmrec.cli.common import App
from llmrec.cli.options import takes
from llmrec.cli.show.console import short, show, show_shard
from llmrec.cluster.merge.options import refuse_both

app = App()


@app.command()
@takes(RankOptions)
def rank(options: RankOptions) -> None:
    """Rank items for a file of requests, or for every user.

    By a language model or a classic recommender: candidate sets, or the whole catalogue. A killed run resumes where it
    was. Exit code 0: every line ranked; 1: some failed, and say why; 2: nothing done.
    """
    from llmrec.answer.rank.progress import console_rows
    from llmrec.answer.rank.run import STDOUT, rank_file
    from llmrec.answer.rank.sharded import rank_shard
    from llmrec.answer.rank.users import rank_users

    refuse_both(options.shard, options.ray)
    check_cluster(options)
    if options.all_users:
        told = rank_users(options)
        show("lists", told, short)
        raise typer.Exit(int(told["failed"] != 0))
    if options.shard is not None:
        from llmrec.records import Shard

        done = show_shard(rank_shard(options, Shard.parse(options.shard)), options.target)
        raise typer.Exit(int(done["failed"] != 0))
    if options.ray is not None:
        from llmrec.cluster.actors import rank_on

        rank_on(options, options.ray)
        return
    summary = rank_file(options)
    where = terminal.err() if options.target == STDOUT else None
    show("ranking", console_rows(summary), told={"ranking": summary}, file=where)
    if summary["failed"]:
        raise typer.Exit(1)
