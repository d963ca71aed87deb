llmrec rank --model shop --all-users --to lists.parquet
llmrec rank --model shop --all-users --to lists.db
