// @ts-check
// Swagger UI over the service's own OpenAPI document; nothing is loaded from elsewhere.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#api", deepLinking: true, validatorUrl: null });
