llamafactory-cli train language_model.yaml
