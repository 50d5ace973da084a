"""Pages for programs about the whole site: llms.txt, the sitemap, the RSS feed and robots.txt."""

from starlette.requests import Request
from starlette.responses import Response

from unmask.web.catalogue.alternates import feed_items, last_change
from unmask.web.rendering import environment, text_response
from unmask.web.site import Site


async def llms_txt(site: Site, request: Request) -> Response:
    return _feed(site, request, "llms.txt.j2", "text/plain", models=site.model_views(request))


async def sitemap(site: Site, request: Request) -> Response:
    models = [(view, last_change(view)) for view in site.model_views(request)]
    return _feed(site, request, "sitemap.xml.j2", "application/xml", models=models)


async def rss_feed(site: Site, request: Request) -> Response:
    items = feed_items(site.model_views(request))
    return _feed(site, request, "feed.xml.j2", "application/rss+xml", items=items)


async def robots_txt(site: Site, request: Request) -> Response:
    closed = "".join(f"Disallow: {path}\n" for path in ("/v1/", "/playground", "/account", "/admin"))
    text = f"User-agent: *\n{closed}Sitemap: {site.url(request)}/sitemap.xml\n"
    return text_response(request, text, "text/plain")


def _feed(site: Site, request: Request, template: str, media_type: str, **values: object) -> Response:
    text = environment().get_template(template).render(base=site.url(request), **values)
    return text_response(request, text, media_type)
