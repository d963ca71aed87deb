import os

import pandas as pd
from recbole.quick_start import load_data_and_model, run_recbole
from recbole.utils.case_study import full_sort_topk

COLUMNS = {"customer_id": "user_id:token", "product_id": "item_id:token", "ordered_at": "timestamp:float"}
CONFIG = {
    "data_path": ".",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "full"},
    "valid_metric": "NDCG@10",
    "train_neg_sample_args": None,
}

frame = pd.concat(pd.read_csv(f"{part}.csv", parse_dates=["ordered_at"]) for part in ("train", "test"))
frame["ordered_at"] = frame["ordered_at"].astype("int64")
os.makedirs("shop", exist_ok=True)
frame[list(COLUMNS)].rename(columns=COLUMNS).to_csv("shop/shop.inter", sep="\t", index=False)
run_recbole("SASRec", "shop", config_dict=CONFIG)
saved = next(os.scandir("saved")).path
config, model, dataset, _, _, test = load_data_and_model(saved)
users = dataset.field2id_token["user_id"][1:]
scores, ids = full_sort_topk(dataset.token2id("user_id", users), model, test, k=40, device=config["device"])
lists = pd.DataFrame({"user_id": users.repeat(40), "item_id": dataset.id2token("item_id", ids.cpu()).ravel()})
lists["score"] = scores.cpu().ravel()
# RecBole's sequential models also rank seen items.
train = pd.read_csv("train.csv")
seen = set(zip(train["customer_id"], train["product_id"]))
lists = lists[[pair not in seen for pair in zip(lists["user_id"], lists["item_id"])]].groupby("user_id").head(10)
lists.assign(rank=lists.groupby("user_id").cumcount() + 1).to_csv("lists.csv", index=False)
