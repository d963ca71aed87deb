"""CTR hosts: networks over fields that judge one item for one user, and take features that were made before."""
